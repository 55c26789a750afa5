"""How long a run of a plan takes, what it reads and writes and how much memory: from shapes, by measured rates."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llmsurgeon.formats.devices import chosen_device
from llmsurgeon.model.costs import layer_parameters, part_work
from llmsurgeon.model.spec import ModelSpec
from llmsurgeon.operations import Step
from llmsurgeon.operations.base import HELD_OUT
from llmsurgeon.operations.fit_memory import Text
from llmsurgeon.operations.fit_work import PartWork, Work
from llmsurgeon.planning.opened import bytes_of, shapes_of
from llmsurgeon.planning.plan import Planned
from llmsurgeon.planning.rates import Rates, rates
from llmsurgeon.walk.memory import room, taken

FLOAT, CHUNK = 4, 256  # bytes of a float32; rows of logits that are compared at a time


@dataclass(frozen=True)
class Estimate:
    """What a run takes.

    seconds; bytes read from files, those read again included, and bytes written; the most memory, without pages of
    files that the kernel can drop. without: what the recipe asks for and is not counted in the seconds.
    """

    seconds: float
    bytes_read: int
    bytes_written: int
    peak_memory_bytes: int
    without: tuple[str, ...]
    rates: Rates

    def to_dict(self) -> dict[str, Any]:
        """As --json prints it."""
        return {**asdict(self), "without": list(self.without)}


@dataclass(frozen=True)
class _Sizes:
    """Of one of the two models: bytes of its weights, and what the parts of its layers multiply for a token."""

    bytes: int
    passes: PartWork

    @property
    def whole(self) -> float:
        """What all of its layers multiply for a token."""
        return sum(map(sum, self.passes))


def estimate(planned: Planned, dtype: torch.dtype, speeds: Rates, process: int) -> Estimate:
    """Of a run of the plan that computes in `dtype`, in a process that takes so many bytes before it begins."""
    parent, wanted = planned.parent, planned.recipe.calibration
    text = Text(wanted.tokens, min(wanted.sequence_length, wanted.tokens), dtype.itemsize)
    before = _sizes(planned, parent.spec, parent.meta(), text)
    after = _sizes(planned, planned.spec, planned.meta, text)
    work, read, written, seconds = Work(), after.bytes, planned.after.disk_bytes, 0.0
    without = _measured(planned)
    for step in planned.heals:
        seconds += (step.minutes_given() or 0) * 60
        found = step.fit_work(parent.spec, planned.spec, (before.passes, after.passes), _of_step(text, step))
        if found is None:
            without += () if step.minutes_given() else (step.op,)
            continue
        work, read = work + found, read + before.bytes + after.bytes
    judging = _judged(planned, text)
    if judging:
        logits = judging * parent.spec.vocab
        work += Work(layers=judging * (before.whole + after.whole) + 4.0 * logits * parent.spec.hidden)
        seconds += logits / speeds.compared
        read += before.bytes + after.bytes
    seconds += _sampling(planned, before, speeds)
    written += round(work.moved) * parent.dtype.itemsize
    seconds += _computing(work, speeds) + _reading(read, before.bytes, speeds) + written / speeds.written
    return Estimate(round(seconds, 1), read, written, process + _peak(planned, dtype, judging), without, speeds)


def _sampling(planned: Planned, parent: _Sizes, speeds: Rates) -> float:
    """Seconds in which the parent writes its share of the text, where none of it is kept from before."""
    wanted, spec = planned.recipe.calibration, planned.parent.spec
    if not planned.text_shares:
        return 0.0
    drawn = planned.text_tokens * wanted.written_share(bool(planned.parent.family.encoder))
    return drawn * ((parent.whole + 2.0 * spec.vocab * spec.hidden) / speeds.stepped + spec.vocab / speeds.drawn)


def _computing(work: Work, speeds: Rates) -> float:
    return work.layers / speeds.layers + work.sums / speeds.sums + work.wide / speeds.wide + work.solved / speeds.solved


def _reading(read: int, parent: int, speeds: Rates) -> float:
    """Seconds: what memory holds is read from the disk once."""
    free = room()
    cold = min(read, parent) if free and parent < free.bytes else read
    return cold / speeds.read + (read - cold) / speeds.read_again


def _of_step(text: Text, step: Step) -> Text:
    """The text as a step works with it."""
    return replace(text, tokens=step.calibration_tokens() or text.tokens, held_out=step.withholds() or 0.0)


def _judged(planned: Planned, text: Text) -> int:
    """Tokens that judge the result, whole sequences."""
    if not (planned.heals or planned.recipe.gate or planned.recipe.calibration.sources):
        return 0
    share = max([step.withholds() or 0.0 for step in planned.heals], default=0.0) or HELD_OUT
    return max(1, round(share * text.tokens / text.sequence_length)) * text.sequence_length


def _measured(planned: Planned) -> tuple[str, ...]:
    """What is not counted: scores."""
    return tuple(f"the score {name}" for name in sorted({n for step in planned.recipe.steps for n in step.needs()}))


def _sizes(planned: Planned, spec: ModelSpec, meta: Mapping[str, torch.Tensor], text: Text) -> _Sizes:
    shapes = shapes_of(meta)
    return _Sizes(bytes_of(meta), part_work(spec, planned.parent.family, shapes, text.sequence_length))


def _peak(planned: Planned, dtype: torch.dtype, judging: int) -> int:
    """The most of: closed-form fits, an edit, the final judgement."""
    parent = planned.parent
    streams = 3 * judging * parent.spec.hidden * dtype.itemsize
    sequence = min(planned.recipe.calibration.sequence_length, judging)
    logits = parent.spec.vocab * (2 * sequence * dtype.itemsize + 3 * min(CHUNK, sequence) * FLOAT)
    converted = 0
    if parent.dtype != dtype:  # else weights are pages of their files
        tables = 2 * parent.spec.vocab * parent.spec.hidden
        largest = max(layer_parameters(planned.spec, parent.family, shapes_of(planned.meta)), default=0)
        converted = dtype.itemsize * (2 * tables + 2 * largest)
    return converted + max(planned.healing_bytes, planned.peak_bytes, streams + logits)


def estimated(planned: Planned, out: str, dtype: torch.dtype | None, device: str) -> Estimate:
    """Of a run of the plan that writes `out`, by rates of this machine. A few seconds where they are not known yet.

    dtype, device: as a run is told.

    Raises:
        SurgeryError: the device cannot be used, or no disk can be measured.
    """
    device = chosen_device(device)
    computed, process = planned.parent.computed_in(dtype, device), taken()
    speeds = rates(planned.parent.spec.hidden, computed, device, _nearest(out))
    return estimate(planned, computed, speeds, process)


def _nearest(out: str) -> Path:
    """The folder that is there, nearest to where `out` will be; that of temporary files where it may not be written."""
    place = Path(out).expanduser().absolute().parent
    while not place.is_dir():
        place = place.parent
    return place if os.access(place, os.W_OK) else Path(tempfile.gettempdir())
