"""accelerate, as `accelerate launch` was told."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats.devices import told_to_use_cpu
from llmsurgeon.processes.world import several

if TYPE_CHECKING:
    from accelerate import Accelerator

    from llmsurgeon.operations.distill import Distill


# Which device accelerate computes on, as its own environment variable says it.
DEVICE = "ACCELERATE_TORCH_DEVICE"


def engine(settings: Distill, device: str, low_precision: bool, logs: Path) -> Accelerator:
    """accelerate, as `accelerate launch` was told, else one process on `device`.

    Raises:
        SurgeryError: a tracker is unknown or not installed, or the device cannot compute in the precision.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.tracking import get_available_trackers

    # Saving a state it warns of tied heads, which are saved once and tied again.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    available = [str(tracker) for tracker in get_available_trackers()]
    for tracker in settings.trackers:
        if tracker not in available:
            raise SurgeryError(
                f"distill.trackers: {tracker} is not one of those that accelerate finds installed "
                f"({', '.join(available) or 'none'})"
            )
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or several()
    named = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
    precision = named.get(settings.precision)
    if precision is None and not launched:
        precision = "bf16" if low_precision else "no"
    # Another step of the same process may have asked for another precision, or been on another device.
    AcceleratorState._reset_state(reset_partial_state=not launched)
    GradientState._reset_state()
    try:
        with _on(None if launched else device):
            return Accelerator(
                mixed_precision=precision,
                gradient_accumulation_steps=settings.accumulate,
                cpu=on_cpu() if launched else device == "cpu",
                log_with=list(settings.trackers) or None,
                project_dir=str(logs) if settings.trackers else None,
            )
    except ValueError as error:
        raise SurgeryError(f"distill: accelerate cannot start: {error}") from error


@contextmanager
def _on(device: str | None) -> Iterator[None]:
    """accelerate takes this device, where one is named: by itself it would take the machine's first card."""
    before = os.environ.get(DEVICE)
    if device is not None:
        os.environ[DEVICE] = device
    try:
        yield
    finally:
        os.environ.pop(DEVICE, None)
        if before is not None:
            os.environ[DEVICE] = before


def on_cpu() -> bool:
    """True where launched processes are to compute on the CPU: they were told to, or there is nothing else."""
    return told_to_use_cpu() or not torch.accelerator.is_available()
