"""`run`: a recipe on a model. Open, resolve, plan, heal, judge, write."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmsurgeon.analysis.scores import compute_scores
from llmsurgeon.checkpoint.push import prepare
from llmsurgeon.checkpoint.shards import parse_size
from llmsurgeon.checkpoint.writer import Stage
from llmsurgeon.errors import GateFailed
from llmsurgeon.evaluation.decoders import Evaluation
from llmsurgeon.evaluation.encoders import EncoderEvaluation
from llmsurgeon.evaluation.gate import missed
from llmsurgeon.healing.healers import Result
from llmsurgeon.planning.checks import check_processes, check_recipe, check_weights, settled
from llmsurgeon.planning.healed import heal_and_judge
from llmsurgeon.planning.inputs import Inputs
from llmsurgeon.planning.opening import described, files_of, opened
from llmsurgeon.planning.options import Options as Options
from llmsurgeon.planning.options import as_given, model_of
from llmsurgeon.planning.plan import Planned, check_shapes, foreseen, plan
from llmsurgeon.planning.records import RunRecords
from llmsurgeon.planning.texts import Texts
from llmsurgeon.processes.first import from_first, only_first, seen_by_all
from llmsurgeon.processes.world import join
from llmsurgeon.recipe.recipe import Recipe
from llmsurgeon.walk.memory import room


@dataclass(frozen=True)
class Outcome:
    """What a run made. `results`: by the op of the steps that heal, what they did."""

    out: Path
    planned: Planned
    results: Mapping[str, Result]
    evaluation: Evaluation | EncoderEvaluation | None
    gate: tuple[str, ...]


def run(
    recipe: Recipe | str | os.PathLike[str],
    model: str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    options: Options | None = None,
    revision: str | None = None,
) -> Outcome:
    """Run a recipe on a model and write the result to the folder `out`. A run that was killed goes on.

    Several processes, where a launcher started them, measure and fit together, and the first one writes.

    Args:
        recipe: one that is loaded, a file, or the name of a built-in one.
        model: a hub id, a folder or a GGUF file; None: the recipe's.
        revision: of the model, on the hub.

    Raises:
        RecipeError: the recipe cannot be read, or does not fit the model.
        SurgeryError: bad input; nothing is written to `out`.
        GateFailed: the result misses the recipe's gate; it is written all the same, and its card says so.
    """
    join()
    recipe, options = as_given(recipe, options)
    model, out = model_of(model, recipe), os.fspath(out)
    check_processes(recipe)
    parent = opened(model, recipe, revision, options.trust_remote_code, options)
    source = parent.original.checkpoint.path
    place = options.staging(source, *files_of(recipe))
    from_first(lambda: Stage.check(out, **place))
    parse_size(options.max_shard_size)
    repository = from_first(lambda: prepare(options.push))
    check_recipe(parent, recipe)
    recipe = settled(parent, recipe)
    check_weights(parent, recipe)
    check_shapes(parent, recipe)
    inputs = Inputs.of("run", {"model": parent.checkpoint}, recipe, options)
    # Work of another job is heard of before anything is measured.
    from_first(lambda: Stage.check(out, job=inputs.job(), **place))
    wanted = max(step.calibration_tokens() or 0 for step in recipe.steps)
    texts = Texts(parent, recipe.calibration, wanted or recipe.calibration.tokens, options)
    scores: Mapping[str, Any] = {}
    if any(step.needs() for step in recipe.steps):
        scores = compute_scores(recipe.steps, texts.runner, texts.windows, parent.subject({}), options.batch)
    planned = plan(parent, recipe, scores)
    options.planned(planned)
    _say_what_is_short(planned, options)
    resolved = planned.recipe.model_copy(update={"model": model})
    job, needed = inputs.job(planned.recipe), planned.after.disk_bytes
    with only_first(lambda: Stage.open(out, job=job, needed_bytes=needed, **place)) as stage:
        healed = heal_and_judge(planned, texts, seen_by_all(lambda: stage.scratch), logs_of(out))
        if stage is None:
            short = missed(planned.recipe.gate, healed.evaluation)
            return Outcome(Path(out), planned, healed.results, healed.evaluation, tuple(short))
        checkpoints = parent.checkpoint, parent.original.checkpoint
        records = RunRecords(planned, healed, resolved, texts.description, *checkpoints, repository, options.home)
        return finish(stage, out, records, options, inputs)


def _say_what_is_short(planned: Planned, options: Options) -> None:
    """Tell, before hours of work, where closed-form fits want more memory than there is."""
    free = room()
    if free and planned.healing_bytes > free.bytes:
        options.say(
            f"closed-form fits take about {planned.healing_bytes / 1e9:.1f} GB of memory, and {free.bytes / 1e9:.1f} "
            f"GB are free ({free.limit}): the system ends a process that takes more than there is. Give it more "
            "memory, or fuse shorter runs"
        )


def preview(
    recipe: Recipe | str | os.PathLike[str],
    model: str | os.PathLike[str] | None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Planned:
    """What `run` would do, as far as it can be known before anything is measured. A config.json is enough.

    Raises:
        SurgeryError: as `run`.
    """
    recipe, _ = as_given(recipe)
    parent = described(model_of(model, recipe), recipe, revision, trust_remote_code)
    recipe = settled(parent, recipe)
    return plan(parent, recipe, foreseen(parent, recipe))


def finish(stage: Stage, out: str, records: RunRecords, options: Options, inputs: Inputs) -> Outcome:
    """Write the healed weights and all that goes with them, and make `out` appear.

    Raises:
        CheckpointError: something that was read changed meanwhile; OUT does not appear.
        GateFailed: the result misses the recipe's gate; it is there all the same, and its card says so.
        SurgeryError: OUT is there, and could not be pushed to the hub.
    """
    planned, healed = records.planned, records.healed
    weights = planned.written.published(healed.weights, planned.parent.family)
    stage.write_weights(weights, max_shard_size=options.max_shard_size, checksum=options.checksum)
    short = missed(planned.recipe.gate, healed.evaluation)
    records.write(stage, short)
    stage.confirm(inputs.check)
    stage.commit()
    outcome = Outcome(Path(out), planned, healed.results, healed.evaluation, tuple(short))
    repository = records.repository
    if short:
        unpushed = f"; it was not pushed, which `{repository.command(outcome.out)}` does" if repository else ""
        raise GateFailed(f"{out} is written, but it misses the recipe's gate: {'; '.join(short)}{unpushed}", outcome)
    if repository:
        options.say(f"pushed to {repository.send(outcome.out)}")
    return outcome


def logs_of(out: str) -> Path:
    """The folder that trackers write to: it stays whether OUT appears or not."""
    return Path(out).expanduser().resolve().with_name(f"{Path(out).name}-logs")
