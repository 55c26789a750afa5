"""A written student and its parent, paired: which layers of the parent each of the student's stands for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from llmsurgeon.errors import RecipeError, SurgeryError
from llmsurgeon.formats.forms import form_of
from llmsurgeon.model.spec import LayerSpec, ModelSpec
from llmsurgeon.planning.opened import OpenedCheckpoint, shapes_of
from llmsurgeon.planning.plan import Planned
from llmsurgeon.planning.student import student_of, without_empty_layers
from llmsurgeon.recipe.recipe import Recipe, loads
from llmsurgeon.report.provenance import read_recipe, read_surgery


def plan_healing(student: OpenedCheckpoint, parent: OpenedCheckpoint, recipe: Recipe) -> Planned:
    """All that is known before training: which of the parent's layers each of the student's stands for, and the form.

    Raises:
        SurgeryError: the two are not parent and student.
    """
    for key, mine, theirs in (
        ("family", student.family.model_type, parent.family.model_type),
        ("hidden size", student.spec.hidden, parent.spec.hidden),
        ("vocabulary", student.spec.vocab, parent.spec.vocab),
    ):
        if mine != theirs:
            raise SurgeryError(
                f"{student.name} is not cut from {parent.name}: its {key} is {mine}, the parent's {theirs}"
            )
    subject, weights = without_empty_layers(student.subject({}), student.weights)
    subject = replace(subject, spec=_with_parents(subject.spec, parent.spec, student))
    for step in recipe.steps:
        step.plan(replace(parent.subject({}), spec=subject.spec))
    form = form_of(student.checkpoint.config).name
    return Planned(
        parent=parent,
        recipe=recipe,
        student=student_of(parent, subject, weights, form, stored=student),
        notes=(f"Healed from `{Path(student.name).name}`.", *student.notes),
        before=parent.costs(parent.spec, shapes_of(parent.meta())),
    )


def _with_parents(spec: ModelSpec, parent: ModelSpec, student: OpenedCheckpoint) -> ModelSpec:
    """The student's spec with the parent's layers that each of its own stands for."""
    found = _recorded_parents(student, len(spec.layers))
    if found is None and len(spec.layers) == len(parent.layers):
        found = [[index] for index in range(len(spec.layers))]
    if found is None:
        raise SurgeryError(
            f"{student.name} has {len(spec.layers)} blocks, its parent {len(parent.layers)}, and neither block_configs "
            "nor surgery.json says which parent layers each block stands for; heal a checkpoint that llmsurgeon wrote"
        )
    layers = [layer for parents in found for layer in parents]
    if layers != sorted(set(layers)) or not layers or layers[-1] >= len(parent.layers):
        raise SurgeryError(
            f"{student.name}: its blocks stand for parent layers {layers}, which the {len(parent.layers)} layers of "
            "the parent do not fit; --parent must be the model that it was cut from"
        )
    return spec.with_layers([_renumbered(b, tuple(p)) for b, p in zip(spec.layers, found, strict=True)])


def _renumbered(layer: LayerSpec, parents: tuple[int, ...]) -> LayerSpec:
    branches = layer.branches
    if len(branches) == len(parents):
        branches = tuple(replace(b, parents=(p,)) for b, p in zip(branches, parents, strict=True))
    return replace(layer, parents=parents, branches=branches)


def _recorded_parents(student: OpenedCheckpoint, blocks: int) -> list[list[int]] | None:
    """What the checkpoint says of where its layers come from, None where it says nothing."""
    records = read_surgery(student.checkpoint.path)
    recorded: Any = records and records.parents
    if recorded is None:
        recorded = [entry.get("parents") for entry in student.config.get("block_configs") or ()]
    usable = len(recorded) == blocks and all(
        isinstance(p, list) and p and all(type(layer) is int for layer in p) for p in recorded
    )
    return recorded if usable else None


def whole_recipe(student: OpenedCheckpoint, recipe: Recipe) -> Recipe:
    """The recipe that leads from the parent to the healed student, where the student came with its own."""
    text = read_recipe(student.checkpoint.path)
    try:
        before = loads(text, folder=student.checkpoint.path) if text else None
    except RecipeError:
        before = None
    if before is None:
        return recipe
    return recipe.model_copy(update={"steps": (*before.steps, *recipe.steps)})
