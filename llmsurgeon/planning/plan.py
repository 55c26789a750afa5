"""What a recipe will do to a checkpoint, known and checked before a tensor is read."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llmsurgeon.checkpoint.transform import TransformedWeights
from llmsurgeon.formats.bitnet import one_scale
from llmsurgeon.formats.form import Packing, Written
from llmsurgeon.formats.write import packing_for
from llmsurgeon.model.costs import Costs
from llmsurgeon.model.spec import ModelSpec
from llmsurgeon.operations import Step
from llmsurgeon.operations.fit_memory import Text
from llmsurgeon.planning.checks import check_recipe
from llmsurgeon.planning.opened import DescribedModel, shapes_of
from llmsurgeon.planning.student import Student, student_of
from llmsurgeon.recipe.recipe import Recipe

# What an edit that is computed a block of rows at a time holds, in float32 with its inputs.
STREAMED_BYTES = 8 << 20


@dataclass(frozen=True)
class Planned:
    """Everything that is known before a tensor is read; the steps of `recipe` are resolved."""

    parent: DescribedModel
    recipe: Recipe
    student: Student
    notes: tuple[str, ...]
    before: Costs

    @property
    def spec(self) -> ModelSpec:
        """The student's description."""
        return self.student.subject.spec

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The student's own, unhealed."""
        return self.student.weights

    @property
    def meta(self) -> Mapping[str, Tensor]:
        """What will be written, on the meta device."""
        return self.student.meta

    @property
    def written(self) -> Written:
        """The form that is written."""
        return self.student.written

    @property
    def after(self) -> Costs:
        """The student's costs."""
        return self.student.costs

    @property
    def heals(self) -> tuple[Step, ...]:
        """The steps that heal, in order."""
        return tuple(step for step in self.recipe.steps if step.heals)

    @property
    def text_shares(self) -> dict[str, float]:
        """What the calibration text is, and how much of each; {} where nothing is computed on text."""
        recipe = self.recipe
        if not (recipe.calibration.sources or recipe.gate or any(step.computes() for step in recipe.steps)):
            return {}
        return recipe.calibration.shares(self.parent.family.encoder)

    @property
    def peak_bytes(self) -> int:
        """The most that one computed tensor and what it is made from take, when weights are edited."""
        return max((_group_bytes(self.meta, name) for name in self.meta), default=0)

    @property
    def stream_bytes(self) -> int:
        """What one hidden state of each token of the calibration text takes; 0 where nothing reads text."""
        wanted = self.recipe.calibration
        if not (self.heals or self.recipe.gate or wanted.text or wanted.dataset):
            return 0
        return self.text_tokens * self.parent.spec.hidden * self.parent.dtype.itemsize

    @property
    def text_tokens(self) -> int:
        """Tokens of the calibration text: as many as the step that reads most of it."""
        steps = (step.calibration_tokens() or 0 for step in self.recipe.steps)
        return max([self.recipe.calibration.tokens, *steps])

    @property
    def healing_bytes(self) -> int:
        """About the most that closed-form fits (refit, ternary codes that compensate) take beside the process itself.

        From shapes; 0 where the recipe has no such step.
        """
        wanted, shapes, found = self.recipe.calibration, shapes_of(self.meta), 0
        for step in self.heals:
            tokens = step.calibration_tokens() or wanted.tokens
            text = Text(tokens, wanted.sequence_length, self.parent.dtype.itemsize)
            found = max(found, step.fit_bytes(self.parent.spec, self.student.subject, shapes, text))
        return found


def plan(parent: DescribedModel, recipe: Recipe, scores: Mapping[str, Any]) -> Planned:
    """Resolve and plan every step, choose the format, and check the result on the meta device.

    Raises:
        SurgeryError: a step does not fit the model or its place, or the format cannot express the result.
    """
    check_recipe(parent, recipe)
    subject, weights = parent.subject(scores), parent.weights
    steps: list[Step] = []
    notes = list(parent.notes)
    for step in recipe.steps:
        steps.append(step.resolve(subject))
        planned = steps[-1].plan(subject)
        weights = TransformedWeights(weights, planned.transforms)
        subject = subject.after(planned)
        notes += planned.notes
    student = student_of(parent, subject, weights, recipe.format, lambda made: _packing(made, steps))
    whole = parent.original
    return Planned(
        parent=parent,
        recipe=recipe.model_copy(update={"steps": tuple(steps)}),
        student=student,
        notes=tuple(notes),
        before=whole.costs(whole.spec, shapes_of(whole.meta())),
    )


def foreseen(parent: DescribedModel, recipe: Recipe) -> dict[str, Any]:
    """For a dry run: what shapes alone say of the scores that the recipe's steps ask for."""
    scores: dict[str, Any] = {}
    for step in recipe.steps:
        for name, values in step.foresee(parent.subject({})).items():
            scores[name] = {**scores.get(name, {}), **values}
    return scores


def check_shapes(parent: DescribedModel, recipe: Recipe) -> None:
    """Raise SurgeryError for what planning refuses whatever is measured: before it is.

    Steps are planned up to the first one whose result scores decide, with scores that only have the right shape.
    """
    subject, steps = parent.subject({}), list[Step]()
    for step in recipe.steps:
        if step.needs() - step.foresee(subject).keys():
            break
        steps.append(step)
    if any(step.needs() for step in steps):
        first = recipe.model_copy(update={"steps": tuple(steps), "format": "auto", "gate": None})
        plan(parent, first, foreseen(parent, first))


def _packing(student: Student, steps: Sequence[Step]) -> Packing:
    """How the linears that the steps make ternary are packed, whose weights are not ternary yet.

    Raises:
        SurgeryError: a step gives them several scales.
    """
    names: dict[str, str] = {}
    for step in steps:
        names |= step.made_ternary(student.subject)
    for granularity in names.values():
        if granularity != "tensor":
            raise one_scale("a linear", f"one for each {granularity}")
    return packing_for(student.written, student.meta, names)


def _group_bytes(meta: Mapping[str, Tensor], name: str) -> int:
    """Bytes of a computed tensor and of its sources; 0 where bytes are copied."""
    if not isinstance(meta, TransformedWeights) or meta.origin(name) is not None:
        return 0
    transform = meta.maker(name)
    if transform is None or transform.fn is None:
        return _group_bytes(meta.base, transform.sources[0] if transform else name)
    if inspect.isgeneratorfunction(transform.fn):
        return STREAMED_BYTES
    tensors = [meta[name], *(meta.base[source] for source in transform.sources)]
    return sum(t.numel() * t.dtype.itemsize for t in tensors)
