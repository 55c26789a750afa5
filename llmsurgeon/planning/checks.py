"""What can be refused before anything is planned or measured: order of steps, text, gate, what the weights are."""

from __future__ import annotations

from collections.abc import Sequence

from llmsurgeon.analysis.scores import unpadded
from llmsurgeon.errors import SurgeryError
from llmsurgeon.evaluation.gate import check_gate
from llmsurgeon.operations import Step
from llmsurgeon.planning.opened import DescribedModel, OpenedCheckpoint
from llmsurgeon.planning.sources import check_kinds, mixed
from llmsurgeon.processes.world import count
from llmsurgeon.recipe.recipe import Calibration, Recipe


def check_recipe(parent: DescribedModel, recipe: Recipe) -> None:
    """Raise SurgeryError for what needs no planning to be refused."""
    check_gate(recipe.gate, parent.family)
    check_kinds(recipe, bool(parent.family.encoder))
    check_order(recipe.steps)
    for step in recipe.steps:
        parent.subject({}).check(step)
        if parent.tower and step.tower_refusal:
            raise SurgeryError(f"{parent.name}: {step.tower_refusal.format(kind=parent.model_type)}")
    if recipe.calibration.sentences:
        others = {name for step in recipe.steps for name in step.needs()} - unpadded()
        if not parent.family.encoder or others:
            raise SurgeryError(
                f"{parent.name}: calibration.sentences is for encoders, with fff, refit, distill and unscored steps"
                + (f"; here {', '.join(sorted(others))} would be measured on padding, too" if others else "")
            )
    if recipe.gate or any(step.needs() or step.heals for step in recipe.steps):
        check_text(parent, recipe.calibration)


def check_processes(recipe: Recipe) -> None:
    """Raise SurgeryError for a step whose work several processes cannot share, where there are several."""
    for step in recipe.steps if count() > 1 else ():
        if step.alone:
            raise SurgeryError(f"{step.op} {step.alone}")


def check_order(steps: Sequence[Step]) -> None:
    """Raise SurgeryError for steps that cannot follow one another; before anything is measured for them."""
    for place, step in enumerate(steps):
        before = steps[:place]
        if before and before[-1].heals and not step.heals:
            raise SurgeryError(f"step {step.op} comes after {before[-1].op}: cuts come first, healing last")
        for earlier in before:
            earlier.check_follower(step)
        step.check_place(before)


def settled(parent: DescribedModel, recipe: Recipe) -> Recipe:
    """The recipe with what its calibration leaves open: a window's length, and what is sampled beside named text."""
    recipe = within_positions(parent, recipe)
    return recipe.model_copy(update={"calibration": mixed(parent, recipe.calibration)})


def within_positions(parent: DescribedModel, recipe: Recipe) -> Recipe:
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


def check_text(parent: DescribedModel, wanted: Calibration) -> None:
    """Raise SurgeryError where text is needed and the model cannot sample what is not given."""
    sampled = not wanted.sources or wanted.self_share or any(source.self for source in wanted.sources)
    if parent.family.encoder and sampled:
        raise SurgeryError(
            f"{parent.name}: {parent.family.model_type} is an encoder and cannot sample text from itself; "
            "give --text FILE or --dataset NAME (in a recipe: under calibration). Only cuts by layer or by weights "
            "need none, without refit (--no-refit) and gate"
        )


def check_weights(parent: OpenedCheckpoint, recipe: Recipe) -> None:
    """Raise SurgeryError where the weights themselves are not such that a step can take them."""
    subject = parent.subject({})
    for step in recipe.steps:
        step.check_weights(subject, parent.weights)
