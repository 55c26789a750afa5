"""Local distillation: each changed block on its own, towards what the parent's layers do with the parent's activations.

The parent is walked once, layer by layer; what enters and leaves each changed block's span is kept on disk. Blocks then
know nothing of each other: they train in as many processes as are asked for, and each costs the memory of one block.
"""

from __future__ import annotations

import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from llmsurgeon.checkpoint.kept import writing
from llmsurgeon.errors import Stopped, SurgeryError
from llmsurgeon.formats.models import empty_model
from llmsurgeon.formats.surgeon import as_surgeon
from llmsurgeon.healing.distill.case import Case
from llmsurgeon.healing.distill.crew import STOPPED, Crew
from llmsurgeon.healing.distill.data import Corpus, Rows, rows_of
from llmsurgeon.healing.distill.divergence import normalised_mse
from llmsurgeon.healing.distill.engine import engine
from llmsurgeon.healing.distill.latent import install, packed
from llmsurgeon.healing.distill.loop import Trainer
from llmsurgeon.healing.distill.targets import StoredTargets, Wanted
from llmsurgeon.healing.distill.training import RESULT, Limits, Run, Training, trained
from llmsurgeon.healing.spans import spans
from llmsurgeon.model.families import family_of
from llmsurgeon.progress import Progress, set_quiet
from llmsurgeon.walk.runner import LayerRunner

if TYPE_CHECKING:
    from llmsurgeon.operations.distill import Distill


Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class BlockJob:
    """All that a process needs to train one block.

    enters, leaves: parent layers behind which the block's input and wanted output are.
    calls: how the model calls the layer, by the number of sequences: arguments beside the hidden state.
    weights: file with the block's tensors, named as inside the block; dense: the same with those that the parent has.
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


class BlockStudent(nn.Module):
    """One block with its loss."""

    def __init__(self, layer: nn.Module, calls: dict[int, Call]) -> None:
        super().__init__()
        self.layer, self._calls = layer, calls

    def forward(self, entered: Tensor, wanted: Tensor) -> dict[str, Tensor]:
        """MSE to the parent relative to the parent's own size, [B, L, D] each."""
        args, kwargs = self._calls[len(entered)]
        output = self.layer(entered, *args, **kwargs)
        return {"loss": normalised_mse(output[0] if isinstance(output, tuple) else output, wanted)}


class LocalTask:
    """What enters and leaves one block's span in the parent."""

    ahead = 1

    def __init__(self, job: BlockJob) -> None:
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
        """The block's input and wanted output."""
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


def distill_locally(case: Case, settings: Distill, began: float) -> list[tuple[int, Training]]:
    """Train each changed block; (block, training) for each, the trained tensors named as inside the block.

    Raises:
        SurgeryError: nothing was changed, or a loss diverges.
        Stopped: on SIGTERM, with all states saved.
    """
    through = spans(case.spec, len(case.parent_spec.layers))
    todo = {index: (span[0] - 1, span[-1]) for index, span in enumerate(through) if case.changed(index, span)}
    if not todo:
        raise SurgeryError("distill, mode local: no block of this student differs from its parent's layer")
    wanted = Wanted(tuple(sorted({tap for ends in todo.values() for tap in ends})), 0)
    corpus = case.corpus(settings.seed)
    judges = _held_out(case, settings)
    everything = np.arange(len(judges.tokens))
    for rows, numbers in ((corpus, _visited(corpus, settings)), (Corpus([judges], [everything], 0), everything)):
        StoredTargets(rows, lambda: case.parent, case.fingerprint, wanted, case.batch).prepare(numbers)
    student = LayerRunner(case.config, case.weights, torch.float32, case.device)
    # Batches that train, that judge, and the last of those.
    sizes = {settings.batch, min(settings.batch, len(judges.tokens)), len(judges.tokens) % settings.batch} - {0}
    for size in sizes:
        student.embed(corpus.tokens(np.zeros(size, np.int64)))
    jobs = [_job(case, settings, index, ends, student, sizes, wanted, judges, corpus) for index, ends in todo.items()]
    _run(jobs, settings, began)
    return [(job.index, _trained(job, case.parent.family.transposed)) for job in jobs]


def _trained(job: BlockJob, transposed: bool) -> Training:
    """What a job's folder says of its training, ternary linears in place of their latent weights."""
    training = trained(job.folder / RESULT)
    if training is None:
        raise SurgeryError(f"{job.folder}: what block {job.index} was trained to is damaged; start again")
    return packed(training, lambda name: job.stored, transposed)


def _held_out(case: Case, settings: Distill) -> Rows:
    """The rows that judge, cut as the training rows are."""
    rows = rows_of(case.held_out, settings.sequence_length, "the held-out text")
    count = max(1, settings.evaluation_tokens // settings.sequence_length)
    return replace(rows, tokens=rows.tokens[:count], key=f"{rows.key}-{count}")


def _visited(corpus: Corpus, settings: Distill) -> np.ndarray:
    """The rows that the run can come by: as many as its steps or tokens reach, else all of them."""
    steps, tokens, _ = settings.limits
    a_step = settings.batch * settings.accumulate
    length = corpus.sources[0].tokens.shape[1]
    counts = [steps * a_step] if steps else []
    counts += [tokens // length + a_step] if tokens else []
    if counts:
        return np.unique(corpus.upcoming(min(counts)))
    starts = corpus.starts[:-1]
    return np.concatenate([start + allowed for start, allowed in zip(starts, corpus.allowed, strict=True)])


def _job(
    case: Case,
    settings: Distill,
    index: int,
    ends: tuple[int, int],
    student: LayerRunner,
    sizes: set[int],
    wanted: Wanted,
    judges: Rows,
    corpus: Corpus,
) -> BlockJob:
    """The job of one block; its tensors are written where its process finds them."""
    from safetensors.torch import save_file

    folder = case.folder / f"block-{index:04d}"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    prefix = student.family.layer(index)
    names = [name for name in student.layers[index].state_dict()]
    weights = folder / "before.safetensors"
    with writing(folder):
        save_file({name: case.weights[prefix + name].float().contiguous() for name in names}, weights)
    dense = folder / "dense.safetensors"
    theirs = {name: case.dense(prefix + name) for name in names}
    with writing(folder):
        save_file({name: t.float().contiguous() for name, t in theirs.items() if t is not None}, dense)
    return BlockJob(
        config=case.config,
        index=index,
        enters=ends[0],
        leaves=ends[1],
        calls={size: student.call_of(index, size) for size in sizes},
        weights=weights,
        dense=dense,
        stored=case.weights[prefix + names[0]].dtype,
        corpus=corpus,
        held_out=judges,
        fingerprint=case.fingerprint,
        wanted=wanted,
        settings=settings,
        limits=settings.limits,
        device=case.device,
        dtype=case.parent.dtype,
        folder=folder,
        threads=max(1, torch.get_num_threads() // settings.processes),
    )


def _run(jobs: list[BlockJob], settings: Distill, began: float) -> None:
    """All jobs, `processes` at a time; a time budget is shared out as jobs begin."""
    steps, tokens, minutes = settings.limits
    waiting = [job for job in jobs if trained(job.folder / RESULT) is None]
    with Progress("distill", len(jobs), "blocks") as progress, Crew() as crew:
        progress.advance(len(jobs) - len(waiting))
        while crew.running or (waiting and not crew.asked):
            while waiting and len(crew.running) < settings.processes and not crew.asked:
                share = None
                if minutes:
                    left = minutes - (time.monotonic() - began) / 60
                    share = max(left, 0.01) * min(settings.processes, len(waiting)) / len(waiting)
                job = replace(waiting.pop(0), limits=(steps, tokens, share))
                if settings.processes == 1:
                    with progress.paused():
                        train_block(job)
                    progress.advance()
                    continue
                crew.start(_in_process, job)
            for ended, code in crew.wait():
                if code and not crew.asked:
                    raise _failure(ended, code)
                progress.advance()
    if crew.asked == signal.SIGINT:
        raise KeyboardInterrupt
    if crew.asked:
        raise Stopped(
            "distill: stopped by SIGTERM; the state of every block is saved, and the same command started again goes "
            "on from there"
        )


def _failure(job: BlockJob, code: int) -> SurgeryError:
    note = job.folder / "error.txt"
    message = note.read_text() if note.exists() else f"block {job.index}: its process ended with code {code}"
    return (Stopped if code == STOPPED else SurgeryError)(message)


def _note(path: Path, error: Exception) -> None:
    # Where the disk is full the first process says which one ended, and with what code.
    with suppress(OSError):
        path.write_text(str(error))


def _in_process(job: BlockJob) -> None:
    """`train_block` in a process of its own, its failure written where the first process reads it."""
    set_quiet(True)
    torch.set_num_threads(job.threads)
    note = job.folder / "error.txt"
    note.unlink(missing_ok=True)
    try:
        train_block(job)
    except Stopped as stopped:
        _note(note, stopped)
        sys.exit(STOPPED)
    except SurgeryError as error:
        _note(note, error)
        sys.exit(2)


def train_block(job: BlockJob) -> Training:
    """Train one block from its files.

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
    module = BlockStudent(layer, _in_float32(job.calls))
    run = Run(job.folder, job.limits, prefix="layer.", title=f"distill block {job.index}")
    return Trainer(module, LocalTask(job), job.settings, accelerator, run).run()


def _in_float32(value: Any) -> Any:
    """The call's tensors in the precision that the block trains in."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_in_float32(item) for item in value)
    return {key: _in_float32(item) for key, item in value.items()} if isinstance(value, dict) else value
