"""`heal`, run: a written student beside its parent, trained, and written anew in the form that it has.

Started by `accelerate launch` there are several processes: all of them train, the main one alone writes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from llmsurgeon.checkpoint.shards import parse_size
from llmsurgeon.checkpoint.writer import Stage
from llmsurgeon.errors import RecipeError, SurgeryError
from llmsurgeon.formats.forms import form_of
from llmsurgeon.healing.processes import World
from llmsurgeon.model.spec import LayerSpec, ModelSpec
from llmsurgeon.planning.checks import check_recipe, within_positions
from llmsurgeon.planning.healed import heal_and_judge
from llmsurgeon.planning.inputs import Inputs
from llmsurgeon.planning.opened import OpenedCheckpoint, open_model, shapes_of
from llmsurgeon.planning.opening import files_of
from llmsurgeon.planning.options import Options
from llmsurgeon.planning.plan import Planned
from llmsurgeon.planning.records import RunRecords
from llmsurgeon.planning.student import student_of, without_empty_layers
from llmsurgeon.planning.texts import Texts
from llmsurgeon.planning.trimming import trimmed
from llmsurgeon.recipe.recipe import Recipe, dump, loads
from llmsurgeon.report.provenance import read_recipe, read_surgery
from llmsurgeon.run import Outcome, finish, logs_of
from llmsurgeon.vocabulary.trimmed import trimmed_like


def heal(
    student: str,
    parent: str,
    recipe: Recipe,
    out: str,
    options: Options,
    *,
    revision: str | None = None,
    resume: bool = False,
) -> Outcome | None:
    """Distill `student` (a checkpoint cut from `parent`) by the distill steps of `recipe` and write it to `out`.

    `revision` is the parent's. A run that was killed goes on by itself; `resume` insists on it. Returns None in all
    processes but the main one.

    Raises:
        SurgeryError: bad input; nothing is written to `out`.
        GateFailed: the result misses the recipe's gate; it is written all the same, and its card says so.
        Stopped: on SIGTERM, with the state saved.
    """
    cut, whole, planned = prepare(student, parent, recipe, revision, options.trust_remote_code)
    recipe = planned.recipe
    place = options.staging(cut.checkpoint.path, whole.original.checkpoint.path, *files_of(recipe))
    parse_size(options.max_shard_size)
    inputs = Inputs.of("heal", {"student": cut.checkpoint, "parent": whole.checkpoint}, recipe, options)
    job = inputs.job(recipe)
    world = World()
    world.main_alone(lambda: Stage.check(out, job=job, resume=resume, **place))
    options = options if world.main else replace(options, say=lambda line: None)
    texts = Texts(whole, recipe.calibration, recipe.calibration.tokens, options)
    with world.stage(
        out,
        job=job,
        resume=resume,
        needed_bytes=planned.after.disk_bytes,
        **place,
    ) as (stage, scratch):
        with world.main_first():
            _ = texts.windows
        healed = heal_and_judge(planned, texts, scratch, logs_of(out))
        if stage is None:
            return None
        resolved = dump(_whole_recipe(cut, recipe).model_copy(update={"model": parent}), Path(out))
        records = RunRecords(planned, healed, resolved, texts.description, cut.checkpoint)
        return finish(stage, out, records, options, inputs)


def prepare(
    student: str, parent: str, recipe: Recipe, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[OpenedCheckpoint, OpenedCheckpoint, Planned]:
    """(student, parent, all that is known before the one is trained to be like the other by the steps of `recipe`).

    Raises:
        SurgeryError: the recipe has no such step, or the two are not parent and student.
    """
    cut = open_model(student, trust_remote_code=trust_remote_code)
    whole = open_model(parent, revision, trust_remote_code)
    if cut.spec.vocab < whole.spec.vocab:
        whole = trimmed(whole, trimmed_like(cut.checkpoint, whole.checkpoint))
    steps = tuple(step for step in recipe.steps if step.trains)
    if not steps:
        raise SurgeryError("heal takes the distill steps of a recipe, and this one has none; `llmsurgeon run` refits")
    recipe = recipe.model_copy(update={"steps": steps})
    check_recipe(whole, recipe)
    recipe = within_positions(whole, recipe)
    recipe = recipe.model_copy(update={"steps": tuple(step.resolve(whole.subject({})) for step in steps)})
    return cut, whole, plan_healing(cut, whole, recipe)


def plan_healing(student: OpenedCheckpoint, parent: OpenedCheckpoint, recipe: Recipe) -> Planned:
    """Everything that is known before training: which parent layers each block stands for, and the form to write.

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
    """The student's spec with the parent layers that each block stands for."""
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
    """What the checkpoint says of where its blocks come from, None where it says nothing."""
    records = read_surgery(student.checkpoint.path)
    recorded: Any = records and records.parents
    if recorded is None:
        recorded = [entry.get("parents") for entry in student.config.get("block_configs") or ()]
    usable = len(recorded) == blocks and all(
        isinstance(p, list) and p and all(type(layer) is int for layer in p) for p in recorded
    )
    return recorded if usable else None


def _whole_recipe(student: OpenedCheckpoint, recipe: Recipe) -> Recipe:
    """The recipe that leads from the parent to the healed student, where the student came with its own."""
    text = read_recipe(student.checkpoint.path)
    try:
        before = loads(text, folder=student.checkpoint.path) if text else None
    except RecipeError:
        before = None
    if before is None:
        return recipe
    return recipe.model_copy(update={"steps": (*before.steps, *recipe.steps)})
