"""`heal`, run: a written student beside its parent, trained, and written anew in the form that it has.

Started by `accelerate launch` there are several processes: all of them train, the first one alone writes.
"""

from __future__ import annotations

import os

from llmsurgeon.checkpoint.push import prepare as prepare_push
from llmsurgeon.checkpoint.shards import parse_size
from llmsurgeon.checkpoint.writer import Stage
from llmsurgeon.errors import SurgeryError
from llmsurgeon.planning.checks import check_recipe, settled
from llmsurgeon.planning.healed import heal_and_judge
from llmsurgeon.planning.inputs import Inputs
from llmsurgeon.planning.opened import OpenedCheckpoint, open_model
from llmsurgeon.planning.opening import files_of
from llmsurgeon.planning.options import Options, as_given
from llmsurgeon.planning.pairing import plan_healing, whole_recipe
from llmsurgeon.planning.plan import Planned
from llmsurgeon.planning.records import RunRecords
from llmsurgeon.planning.texts import Texts
from llmsurgeon.planning.trimming import trimmed
from llmsurgeon.processes.first import from_first, only_first, seen_by_all
from llmsurgeon.processes.world import join
from llmsurgeon.recipe.recipe import Recipe
from llmsurgeon.run import Outcome, finish, logs_of
from llmsurgeon.vocabulary.trimmed import trimmed_like


def heal(
    student: str | os.PathLike[str],
    parent: str | os.PathLike[str],
    recipe: Recipe | str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: Options | None = None,
    *,
    revision: str | None = None,
    resume: bool = False,
) -> Outcome | None:
    """Distill `student` (a checkpoint cut from `parent`) by the distill steps of `recipe` and write it to `out`.

    A run that was killed goes on by itself; `resume` insists on it. Returns None in all processes but the first.

    Args:
        student: a folder or a hub id.
        parent: a hub id, a folder or a GGUF file; `revision` is its revision on the hub.
        recipe: one that is loaded, a file, or the name of a built-in one.

    Raises:
        RecipeError: the recipe cannot be read, or does not fit the model.
        SurgeryError: bad input; nothing is written to `out`.
        GateFailed: the result misses the recipe's gate; it is written all the same, and its card says so.
        Stopped: on SIGTERM, with the state saved.
    """
    join()
    recipe, options = as_given(recipe, options)
    student, parent, out = os.fspath(student), os.fspath(parent), os.fspath(out)
    cut, whole, planned = prepare(student, parent, recipe, revision, options.trust_remote_code)
    recipe = planned.recipe
    place = options.staging(cut.checkpoint.path, whole.original.checkpoint.path, *files_of(recipe))
    parse_size(options.max_shard_size)
    inputs = Inputs.of("heal", {"student": cut.checkpoint, "parent": whole.checkpoint}, recipe, options)
    job = inputs.job(recipe)
    from_first(lambda: Stage.check(out, job=job, resume=resume, **place))
    repository = from_first(lambda: prepare_push(options.push))
    texts = Texts(whole, recipe.calibration, recipe.calibration.tokens, options)
    needed = planned.after.disk_bytes
    with only_first(lambda: Stage.open(out, job=job, resume=resume, needed_bytes=needed, **place)) as stage:
        scratch = seen_by_all(lambda: stage.scratch)
        healed = heal_and_judge(planned, texts, scratch, logs_of(out))
        if stage is None:
            return None
        resolved = whole_recipe(cut, recipe).model_copy(update={"model": parent})
        checkpoints = cut.checkpoint, whole.original.checkpoint
        records = RunRecords(planned, healed, resolved, texts.description, *checkpoints, repository)
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
    recipe = settled(whole, recipe)
    recipe = recipe.model_copy(update={"steps": tuple(step.resolve(whole.subject({})) for step in steps)})
    return cut, whole, plan_healing(cut, whole, recipe)
