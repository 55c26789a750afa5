"""Local distillation: each changed layer on its own, towards what the parent's layers do with the parent's activations.

The parent is walked once, layer by layer; what enters and leaves each changed layer's span is kept on disk. Layers then
know nothing of each other: they train in as many processes as are asked for, and each costs the memory of one layer.
"""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from llmsurgeon.checkpoint.kept import writing
from llmsurgeon.errors import Stopped, SurgeryError
from llmsurgeon.healing.distill.case import Case
from llmsurgeon.healing.distill.crew import STOPPED, Crew
from llmsurgeon.healing.distill.data import Corpus, Rows, rows_of
from llmsurgeon.healing.distill.latent import packed
from llmsurgeon.healing.distill.layer_job import LayerJob, in_process, train_layer
from llmsurgeon.healing.distill.targets import StoredTargets, Wanted
from llmsurgeon.healing.distill.training import RESULT, Training, trained
from llmsurgeon.healing.spans import spans
from llmsurgeon.progress import Progress
from llmsurgeon.walk.runner import LayerRunner

if TYPE_CHECKING:
    from llmsurgeon.operations.distill import Distill


@dataclass(frozen=True)
class _Shared:
    """What all jobs have in common: the student layer by layer, the batch sizes that it meets, what the parent must
    say, and the rows that judge and that train."""

    case: Case
    settings: Distill
    student: LayerRunner
    sizes: frozenset[int]
    wanted: Wanted
    judges: Rows
    corpus: Corpus


def distill_locally(case: Case, settings: Distill, began: float) -> list[tuple[int, Training]]:
    """Train each changed layer; (layer, training) for each, the trained tensors named as inside the layer.

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
    shared = _Shared(case, settings, student, frozenset(sizes), wanted, judges, corpus)
    jobs = [_job(shared, index, ends) for index, ends in todo.items()]
    _run(jobs, settings, began)
    return [(job.index, _trained(job, case.parent.family.transposed)) for job in jobs]


def _trained(job: LayerJob, transposed: bool) -> Training:
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


def _job(shared: _Shared, index: int, ends: tuple[int, int]) -> LayerJob:
    """The job of one layer; its tensors are written where its process finds them."""
    from safetensors.torch import save_file

    case, settings, student = shared.case, shared.settings, shared.student
    folder = case.folder / f"block-{index:04d}"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    prefix = student.family.layer(index)
    names = [name for name in student.layers[index].state_dict()]
    weights, dense = folder / "before.safetensors", folder / "dense.safetensors"
    with writing(folder):
        save_file({name: case.weights[prefix + name].float().contiguous() for name in names}, weights)
    theirs = {name: case.dense(prefix + name) for name in names}
    with writing(folder):
        save_file({name: t.float().contiguous() for name, t in theirs.items() if t is not None}, dense)
    return LayerJob(
        config=case.config,
        index=index,
        enters=ends[0],
        leaves=ends[1],
        calls={size: student.call_of(index, size) for size in shared.sizes},
        weights=weights,
        dense=dense,
        stored=case.weights[prefix + names[0]].dtype,
        corpus=shared.corpus,
        held_out=shared.judges,
        fingerprint=case.fingerprint,
        wanted=shared.wanted,
        settings=settings,
        limits=settings.limits,
        device=case.device,
        dtype=case.parent.dtype,
        folder=folder,
        threads=max(1, torch.get_num_threads() // settings.processes),
    )


def _run(jobs: list[LayerJob], settings: Distill, began: float) -> None:
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
                        train_layer(job)
                    progress.advance()
                    continue
                crew.start(in_process, job)
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


def _failure(job: LayerJob, code: int) -> SurgeryError:
    note = job.folder / "error.txt"
    message = note.read_text() if note.exists() else f"block {job.index}: its process ended with code {code}"
    return (Stopped if code == STOPPED else SurgeryError)(message)
