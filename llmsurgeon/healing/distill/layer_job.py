"""One layer trained on its own, in this process or in one of its own: its job, its loss, its data.

B sequences, L tokens, D model width.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from llmsurgeon.errors import Stopped, SurgeryError
from llmsurgeon.formats.models import empty_model
from llmsurgeon.formats.surgeon import as_surgeon
from llmsurgeon.healing.distill.crew import STOPPED
from llmsurgeon.healing.distill.data import Corpus, Rows
from llmsurgeon.healing.distill.divergence import normalised_mse
from llmsurgeon.healing.distill.engine import engine
from llmsurgeon.healing.distill.latent import install
from llmsurgeon.healing.distill.loop import Trainer
from llmsurgeon.healing.distill.targets import StoredTargets, Wanted
from llmsurgeon.healing.distill.training import Limits, Run, Training
from llmsurgeon.model.families import family_of
from llmsurgeon.progress import set_quiet
from llmsurgeon.walk.runner import LayerRunner

if TYPE_CHECKING:
    from llmsurgeon.operations.distill import Distill


Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class LayerJob:
    """All that a process needs to train one layer.

    enters, leaves: parent layers behind which the layer's input and wanted output are.
    calls: how the model calls the layer, by the number of sequences: arguments beside the hidden state.
    weights: file with the layer's tensors, named as inside the layer; dense: the same with those that the parent has.
    stored: what the tensors are stored in.
    """

    config: dict[str, Any]
    index: int
    enters: int
    leaves: int
    calls: dict[int, Call]
    weights: Path
    dense: Path
    stored: torch.dtype
    corpus: Corpus
    held_out: Rows
    fingerprint: str
    wanted: Wanted
    settings: Distill
    limits: Limits
    device: str
    dtype: torch.dtype
    folder: Path
    threads: int


class LayerStudent(nn.Module):
    """One layer with its loss."""

    def __init__(self, layer: nn.Module, calls: dict[int, Call]) -> None:
        super().__init__()
        self.layer, self._calls = layer, calls

    def forward(self, entered: Tensor, wanted: Tensor) -> dict[str, Tensor]:
        """MSE to the parent relative to the parent's own size, [B, L, D] each."""
        args, kwargs = self._calls[len(entered)]
        output = self.layer(entered, *args, **kwargs)
        return {"loss": normalised_mse(output[0] if isinstance(output, tuple) else output, wanted)}


class LocalTask:
    """What enters and leaves one layer's span in the parent."""

    ahead = 1

    def __init__(self, job: LayerJob) -> None:
        self.job = job
        self.corpus = Corpus(job.corpus.sources, job.corpus.allowed, job.settings.seed)
        self._pair = [job.wanted.taps.index(job.enters), job.wanted.taps.index(job.leaves)]
        everything = [np.arange(len(job.held_out.tokens))]
        self._targets, self._judges = (
            StoredTargets(corpus, _nobody, job.fingerprint, job.wanted, 1)
            for corpus in (self.corpus, Corpus([job.held_out], everything, 0))
        )

    def prepare(self, numbers: np.ndarray) -> None:
        """The parent was walked before."""

    def batch(self, numbers: np.ndarray, step: int, device: torch.device) -> dict[str, Tensor]:
        """The layer's input and wanted output."""
        return self._read(self._targets, numbers, device)

    def judge(self, module: nn.Module) -> dict[str, float]:
        """The loss on the held-out rows (the value)."""
        rows, size = np.arange(len(self.job.held_out.tokens)), self.job.settings.batch
        device = next(module.parameters()).device
        total = 0.0
        with torch.no_grad():
            for start in range(0, len(rows), size):
                group = rows[start : start + size]
                total += module(**self._read(self._judges, group, device))["loss"].item() * len(group)
        return {"value": total / len(rows)}

    def _read(self, targets: StoredTargets, numbers: np.ndarray, device: torch.device) -> dict[str, Tensor]:
        entered, wanted = targets.ends(numbers, self._pair)
        return {"entered": entered.float().to(device), "wanted": wanted.to(device)}


def _nobody() -> LayerRunner:
    raise SurgeryError("what the parent said was damaged while blocks trained on it; start again, it is asked anew")


def _note(path: Path, error: Exception) -> None:
    # Where the disk is full the first process says which one ended, and with what code.
    with suppress(OSError):
        path.write_text(str(error))


def in_process(job: LayerJob) -> None:
    """`train_layer` in a process of its own, its failure written where the first process reads it."""
    set_quiet(True)
    torch.set_num_threads(job.threads)
    note = job.folder / "error.txt"
    note.unlink(missing_ok=True)
    try:
        train_layer(job)
    except Stopped as stopped:
        _note(note, stopped)
        sys.exit(STOPPED)
    except SurgeryError as error:
        _note(note, error)
        sys.exit(2)


def train_layer(job: LayerJob) -> Training:
    """Train one layer from its files.

    Raises:
        SurgeryError, Stopped: as `Trainer.run`.
    """
    from safetensors.torch import load_file

    accelerator = engine(job.settings, job.device, job.dtype in (torch.bfloat16, torch.float16), job.folder)
    model = empty_model(as_surgeon(job.config))
    layer = model.get_submodule(family_of(job.config).layers)[job.index]
    layer.load_state_dict(load_file(job.weights), assign=True)
    names, dense = {name for name, _ in layer.named_parameters()}, load_file(job.dense)
    transposed = family_of(job.config).transposed
    moving = install(layer, names, dense.get, lambda name: job.stored, transposed)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name in moving)
    module = LayerStudent(layer, _in_float32(job.calls))
    run = Run(job.folder, job.limits, prefix="layer.", title=f"distill block {job.index}")
    return Trainer(module, LocalTask(job), job.settings, accelerator, run).run()


def _in_float32(value: Any) -> Any:
    """The call's tensors in the precision that the layer trains in."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_in_float32(item) for item in value)
    return {key: _in_float32(item) for key, item in value.items()} if isinstance(value, dict) else value
