"""What a recipe will do to a checkpoint, known and checked before a tensor is read."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from llmsurgeon.checkpoint.transform import TransformedWeights, rebase
from llmsurgeon.errors import SurgeryError
from llmsurgeon.evaluation.gate import check_gate
from llmsurgeon.formats.bitnet import one_scale, packing_of
from llmsurgeon.formats.models import check_shapes, empty_model, expected_shapes
from llmsurgeon.formats.write import Written
from llmsurgeon.model.costs import Costs
from llmsurgeon.model.spec import ModelSpec
from llmsurgeon.operations import Step, Subject
from llmsurgeon.operations.base import all_kept, assemble
from llmsurgeon.operations.refit import Refit
from llmsurgeon.operations.ternary import Ternary, refuse_ternary
from llmsurgeon.operations.trim_vocab import TrimVocab
from llmsurgeon.planning.fit_memory import Text, refit_bytes, ternary_bytes
from llmsurgeon.planning.opened import OpenedCheckpoint, shapes_of
from llmsurgeon.recipe import recipe as recipe_file
from llmsurgeon.recipe.recipe import Recipe

# The score that padded sentences are measured without their padding for.
SENTENCE_SCORE = "fff"

# What an edit that is computed a block of rows at a time holds, in float32 with its inputs.
STREAMED_BYTES = 8 << 20


@dataclass(frozen=True)
class Planned:
    """Everything that is known before a tensor is read.

    `weights` are the student's own, `meta` what will be written, on the meta device.
    """

    parent: OpenedCheckpoint
    recipe: Recipe
    spec: ModelSpec
    weights: Mapping[str, Tensor]
    meta: Mapping[str, Tensor]
    written: Written
    heals: tuple[Step, ...]
    notes: tuple[str, ...]
    before: Costs
    after: Costs

    @property
    def peak_bytes(self) -> int:
        """The most that one computed tensor and what it is made from take, when weights are edited."""
        return max((_group_bytes(self.meta, name) for name in self.meta), default=0)

    @property
    def healing_bytes(self) -> int:
        """About the most that closed-form fits (refit, ternary codes that compensate) take beside the process itself.

        From shapes; 0 where the recipe has no such step.
        """
        wanted, found = self.recipe.calibration, 0
        for step in self.heals:
            tokens = (step.tokens if isinstance(step, Refit) else None) or wanted.tokens
            text = Text(tokens, wanted.sequence_length, self.parent.dtype.itemsize)
            if isinstance(step, Refit):
                found = max(found, refit_bytes(self.parent.spec, self.spec, text))
            elif isinstance(step, Ternary):
                chosen = step.chosen(Subject(self.spec, self.parent.family, frozenset(self.weights)))
                names = {self.parent.family.layer(i) + name for i, inside in chosen.items() for name in inside}
                shapes = [tuple(self.meta[name].shape) for name in names & set(self.meta)]
                turned = [shape[::-1] if self.parent.family.transposed else shape for shape in shapes]
                found = max(found, *(ternary_bytes(i, o, text, self.spec.hidden) for o, i in turned))
        return found


def check_recipe(parent: OpenedCheckpoint, recipe: Recipe) -> None:
    """Raise SurgeryError for what needs no planning to be refused."""
    check_gate(recipe.gate, parent.family)
    check_order(recipe.steps)
    for step in recipe.steps:
        parent.subject({}).check(step.op)
        if parent.tower and step.op == "block":
            raise SurgeryError(
                f"{parent.name}: block is for text models; this is the text tower of a vision-language model "
                f"({parent.model_type}), whose images enter as embeddings that no block of tokens holds"
            )
        if parent.tower and step.op == "distill":
            raise SurgeryError(
                f"{parent.name}: distill saves the text tower alone, without the rest of this vision-language model "
                f"({parent.model_type}); heal it with refit"
            )
    if recipe.calibration.sentences:
        others = {name for step in recipe.steps for name in step.needs()} - {SENTENCE_SCORE}
        if not parent.family.encoder or others:
            raise SurgeryError(
                f"{parent.name}: calibration.sentences is for encoders, with fff, refit, distill and unscored steps"
                + (f"; here {', '.join(sorted(others))} would be measured on padding, too" if others else "")
            )
    if recipe.gate or any(step.needs() or step.heals for step in recipe.steps):
        check_text(parent, recipe.calibration)


def check_order(steps: Sequence[Step]) -> None:
    """Raise SurgeryError for steps that cannot follow one another; before anything is measured for them."""
    for place, step in enumerate(steps):
        before = steps[:place]
        if before and before[-1].heals and not step.heals:
            raise SurgeryError(f"step {step.op} comes after {before[-1].op}: cuts come first, healing last")
        ternary = [done for done in before if isinstance(done, Ternary)]
        if ternary and not (step.heals or isinstance(step, Ternary)):
            raise SurgeryError(f"step {step.op} comes after ternary: what it joins or folds would not stay ternary")
        if isinstance(step, Ternary) and ternary and any(each.sub_norm for each in (*ternary, step)):
            raise SurgeryError("ternary: a step with sub_norm is the only ternary step of a recipe; run two recipes")
        if isinstance(step, TrimVocab) and before:
            raise SurgeryError(
                "step trim_vocab comes first, and once: later steps fit and measure the tokens that stay (`keep` takes "
                "a list)"
            )


def within_positions(parent: OpenedCheckpoint, recipe: Recipe) -> Recipe:
    """The recipe with a window's length that it leaves open lowered to what the model and the tokens hold.

    A length that is given is held against the model where text is read.
    """
    wanted = recipe.calibration
    if "sequence_length" in wanted.model_fields_set:
        return recipe
    length = min(wanted.sequence_length, parent.spec.max_positions or wanted.sequence_length, wanted.tokens)
    if length == wanted.sequence_length:
        return recipe
    return recipe.model_copy(update={"calibration": wanted.model_copy(update={"sequence_length": length})})


def check_text(parent: OpenedCheckpoint, wanted: recipe_file.Calibration) -> None:
    """Raise SurgeryError where text is needed, none is given, and the model cannot sample any."""
    if parent.family.encoder and not (wanted.text or wanted.dataset):
        raise SurgeryError(
            f"{parent.name}: {parent.family.model_type} is an encoder and cannot sample text from itself; "
            "give --text FILE or --dataset NAME (in a recipe: under calibration). Only cuts by layer or by weights "
            "need none, without refit (--no-refit) and gate"
        )


def refuse_ternary_parent(parent: OpenedCheckpoint, recipe: Recipe) -> None:
    """Raise SurgeryError where a linear that is to become ternary is so already, or has no whole groups."""
    subject = parent.subject({})
    for step in (step for step in recipe.steps if isinstance(step, Ternary)):
        for index, names in step.chosen(subject).items():
            for name in names:
                full = parent.family.layer(index) + name
                weight = parent.weights[full]
                step.grid.group(weight.shape[0 if parent.family.transposed else 1])
                refuse_ternary(full, weight, parent.family.transposed)


def plan(parent: OpenedCheckpoint, recipe: Recipe, scores: Mapping[str, Any]) -> Planned:
    """Resolve and plan every step, choose the format, and check the result on the meta device."""
    check_recipe(parent, recipe)
    family = parent.family
    subject = parent.subject(scores)
    weights: Mapping[str, Tensor] = parent.weights
    resolved: list[Step] = []
    notes = list(parent.notes)
    for step in recipe.steps:
        resolved.append(step.resolve(subject))
        planned = resolved[-1].plan(subject)
        weights = TransformedWeights(weights, planned.transforms)
        subject = subject.after(planned)
        notes += planned.notes
    whole = parent.original
    subject, weights = without_empty_layers(subject, weights)
    written = parent.form(subject.spec, recipe.format)
    meta = written.fit(weights if parent.checkpoint is None else rebase(weights, parent.checkpoint.meta()))
    expected = expected_shapes(empty_model(written.config))
    check_shapes(shapes_of(meta), expected, "the planned checkpoint", family, parent.beside)
    after = parent.costs(written.spec, shapes_of(meta))
    if written.format == "bitnet":
        packing = packing_of(written.config, meta, ternary_names(resolved, subject))
        written = replace(written, packing=packing)
        after = replace(after, disk_bytes=after.disk_bytes - packing.saved(meta))
    return Planned(
        parent=parent,
        recipe=recipe.model_copy(update={"steps": tuple(resolved)}),
        spec=subject.spec,
        weights=weights,
        meta=meta,
        written=written,
        heals=tuple(step for step in resolved if step.heals),
        notes=tuple(notes),
        before=whole.costs(whole.spec, shapes_of(whole.meta())),
        after=after,
    )


def foreseen(parent: OpenedCheckpoint, recipe: Recipe) -> dict[str, Any]:
    """For a dry run: what shapes alone say of the scores that the recipe's steps ask for."""
    scores: dict[str, Any] = {}
    for step in recipe.steps:
        for name, values in step.foresee(parent.subject({})).items():
            scores[name] = {**scores.get(name, {}), **values}
    return scores


def ternary_names(steps: Sequence[Step], subject: Subject) -> list[str]:
    """Names of the linears' weights that the steps make ternary with one scale each.

    Raises:
        SurgeryError: a step gives them several.
    """
    prefix = subject.family.layer
    chosen = [step for step in steps if isinstance(step, Ternary)]
    for step in chosen:
        if step.granularity != "tensor":
            raise one_scale("a linear", f"one for each {step.granularity}")
    names = [prefix(i) + name for step in chosen for i, inside in step.chosen(subject).items() for name in inside]
    head = [f"{subject.family.head}.weight"] if any(step.head for step in chosen) else []
    return [*dict.fromkeys(names), *head]


def without_empty_layers(subject: Subject, weights: Mapping[str, Tensor]) -> tuple[Subject, Mapping[str, Tensor]]:
    """The same model without blocks that only pass their input on, as published Nemotron-NAS checkpoints have them."""
    if not any(layer.empty for layer in subject.spec.layers):
        return subject, weights
    made = assemble(subject, all_kept(subject))
    return subject.after(made), TransformedWeights(weights, made.transforms)


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
