"""Where models compute: the device that a name stands for, the one that "auto" takes, and whether it will do."""

from __future__ import annotations

import os

import torch

from llmsurgeon.boundary.foreign import first_lines, shortened
from llmsurgeon.errors import SurgeryError
from llmsurgeon.progress import remark

AUTO = "auto"
# What "auto" tries before the CPU, in this order.
CARDS = ("cuda", "mps")


def chosen_device(name: str) -> str:
    """The device of this name; of "auto" the first card that will do, else the CPU. Says which card it took.

    Where `accelerate launch` or torchrun started several processes, "auto" is each one's own card, or the CPU if they
    were told so.

    Raises:
        SurgeryError: it is no device, or one that this build of torch or this machine does not have, or that lacks what
            the closed forms are computed with.
    """
    if name != AUTO:
        if problem := unusable(name):
            raise SurgeryError(
                f"device {shortened(name)}: cannot be used here ({problem}); expected auto, cpu, or cuda, cuda:1 ... "
                "where torch was built for it and the machine has it"
            )
        return name
    if told_to_use_cpu():
        return "cpu"
    for card in CARDS:
        if not _there(card):
            continue
        own = f"{card}:{os.environ['LOCAL_RANK']}" if card == "cuda" and "LOCAL_RANK" in os.environ else card
        if problem := unusable(own):
            remark(f"{own} is there and cannot be used ({problem}); computing on the CPU")
            continue
        remark(f"computing on {own}{_called(own)}; --device cpu computes on the CPU")
        return own
    return "cpu"


def unusable(name: str) -> str | None:
    """Why a device cannot compute what this tool does, None where it can."""
    try:
        device = torch.device(name)
        if device.type == "meta":
            return "it holds no numbers"
        # Sums over tokens are kept and solved in float64, which not every device has.
        torch.linalg.eigh(torch.eye(2, dtype=torch.float64, device=device))
    except Exception as error:  # each kind of device raises errors of its own
        return first_lines(error, 160)
    return None


def told_to_use_cpu() -> bool:
    """True where `accelerate launch` was told to compute on the CPU."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")


def _there(card: str) -> bool:
    return torch.cuda.is_available() if card == "cuda" else torch.backends.mps.is_available()


def _called(device: str) -> str:
    return f" ({torch.cuda.get_device_name(torch.device(device))})" if device.startswith("cuda") else ""
