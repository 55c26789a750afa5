"""A recipe, run: open, resolve, plan, check on the meta device, heal, write, prove."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsurgeon import __version__
from llmsurgeon.analysis.scores import compute_scores
from llmsurgeon.boundary.places import everywhere, without_folders
from llmsurgeon.checkpoint.kept import writing
from llmsurgeon.checkpoint.shards import parse_size
from llmsurgeon.checkpoint.source import Checkpoint
from llmsurgeon.checkpoint.writer import Stage
from llmsurgeon.errors import GateFailed, SurgeryError
from llmsurgeon.evaluation.bits_per_byte import scored_by
from llmsurgeon.evaluation.decoders import Evaluation
from llmsurgeon.evaluation.encoders import EncoderEvaluation
from llmsurgeon.evaluation.gate import missed, prove, prove_whole, walked
from llmsurgeon.formats.beside import write_beside
from llmsurgeon.formats.configs import normalised
from llmsurgeon.formats.models import filled_model
from llmsurgeon.healing.batches import Batches
from llmsurgeon.healing.distill.distill import Case, Distilled, distill
from llmsurgeon.healing.distill.training import several
from llmsurgeon.healing.refit.block_transformer import refit_block_transformer
from llmsurgeon.healing.refit.context import Context, RefitOptions, Update
from llmsurgeon.healing.refit.refit import refit
from llmsurgeon.healing.store import LayerStore, overlay
from llmsurgeon.healing.ternary.context import TernaryContext
from llmsurgeon.healing.ternary.linears import TernaryLinear
from llmsurgeon.healing.ternary.linears import summary as ternary_summary
from llmsurgeon.healing.ternary.ternarise import ternarise
from llmsurgeon.operations import Subject
from llmsurgeon.operations.distill import Distill as DistillStep
from llmsurgeon.operations.refit import Refit as RefitStep
from llmsurgeon.operations.ternary import Ternary
from llmsurgeon.planning.checks import check_recipe, check_weights, within_positions
from llmsurgeon.planning.inputs import Inputs
from llmsurgeon.planning.opening import files_of, opened
from llmsurgeon.planning.options import Options as Options
from llmsurgeon.planning.plan import Planned, plan
from llmsurgeon.planning.texts import Texts
from llmsurgeon.recipe.recipe import Recipe, dump
from llmsurgeon.report.card import collapse, model_card
from llmsurgeon.report.curve import html_curves
from llmsurgeon.text.calibration import split
from llmsurgeon.walk.runner import LayerRunner


@dataclass(frozen=True)
class Outcome:
    """What a run made."""

    out: Path
    planned: Planned
    updates: tuple[Update, ...]
    evaluation: Evaluation | EncoderEvaluation | None
    gate: tuple[str, ...]
    trainings: tuple[Distilled, ...] = ()


def run(recipe: Recipe, model: str, out: str, options: Options, revision: str | None = None) -> Outcome:
    """Run a recipe on a model and write the result to `out`.

    Raises:
        SurgeryError: bad input; nothing is written to `out`.
        GateFailed: the result misses the recipe's gate; it is written all the same, and its card says so.
    """
    parent = opened(model, recipe, revision, options.trust_remote_code)
    source = parent.original.checkpoint.path
    place = options.staging(source, *files_of(recipe))
    Stage.check(out, **place)
    parse_size(options.max_shard_size)
    if several():
        raise SurgeryError(
            "run is one process: cut and refit first, then `accelerate launch -m llmsurgeon heal OUT --parent MODEL`"
        )
    check_recipe(parent, recipe)
    recipe = within_positions(parent, recipe)
    check_weights(parent, recipe)
    inputs = Inputs.of("run", {"model": parent.checkpoint}, recipe, options)
    # Work of another job is heard of before anything is measured.
    Stage.check(out, job=inputs.job(), **place)
    wanted = max(step.calibration_tokens() or 0 for step in recipe.steps)
    texts = Texts(parent, recipe.calibration, wanted or recipe.calibration.tokens, options)
    scores: Mapping[str, Any] = {}
    if any(step.needs() for step in recipe.steps):
        scores = compute_scores(recipe.steps, texts.runner, texts.windows, parent.subject({}), options.batch)
    planned = plan(parent, recipe, scores)
    options.planned(planned)
    resolved = dump(planned.recipe.model_copy(update={"model": model}), Path(out))
    with Stage.open(
        out,
        job=inputs.job(planned.recipe),
        needed_bytes=planned.after.disk_bytes,
        **place,
    ) as stage:
        healed = heal_and_prove(planned, texts, options, stage.scratch, logs_of(out))
        return finish(stage, out, planned, resolved, healed, texts, parent.checkpoint, inputs)


def finish(
    stage: Stage,
    out: str,
    planned: Planned,
    recipe: str,
    healed: Healed,
    texts: Texts,
    source: Checkpoint,
    inputs: Inputs,
) -> Outcome:
    """Write the healed weights and all that goes with them, `recipe` among it, and make `out` appear.

    Raises:
        CheckpointError: something that was read changed meanwhile; OUT does not appear.
        GateFailed: the result misses the recipe's gate; it is there all the same, and its card says so.
    """
    weights = planned.written.published(healed.weights, planned.parent.family)
    stage.write_weights(weights, max_shard_size=texts.options.max_shard_size)
    short = missed(planned.recipe.gate, healed.evaluation)
    write_story(stage, planned, recipe, healed, texts, short, source)
    stage.confirm(inputs.check)
    stage.commit()
    outcome = Outcome(Path(out), planned, healed.updates, healed.evaluation, tuple(short), healed.trainings)
    if short:
        raise GateFailed(f"{out} is written, but it misses the recipe's gate: " + "; ".join(short), outcome)
    return outcome


def logs_of(out: str) -> Path:
    """The folder that trackers write to: it stays whether OUT appears or not."""
    return Path(out).expanduser().resolve().with_name(f"{Path(out).name}-logs")


@dataclass(frozen=True)
class Healed:
    """The student after healing, what was done to it, and how good it is on held-out text."""

    weights: Mapping[str, Tensor]
    updates: tuple[Update, ...] = ()
    trainings: tuple[Distilled, ...] = ()
    evaluation: Evaluation | EncoderEvaluation | None = None
    ternary: tuple[TernaryLinear, ...] = ()


def heal_and_prove(planned: Planned, texts: Texts, options: Options, folder: Path, logs: Path) -> Healed:
    """Refit and distill as the recipe asks; measure on held-out text where something needs text or one is given.

    `folder` keeps what is done through a kill; trackers write to `logs`.
    """
    # Whoever gives text should hear what the cut did to it.
    given = planned.recipe.calibration.text or planned.recipe.calibration.dataset
    if not planned.heals and planned.recipe.gate is None and not given:
        return Healed(planned.weights)
    healed = Healed(planned.weights)
    refits = [step for step in planned.heals if isinstance(step, RefitStep)]
    ternary = [step for step in planned.heals if isinstance(step, Ternary)]
    shares = [step.held_out for step in refits] + [step.held_out for step in ternary] + [RefitStep().held_out]
    held_out = _held_out(texts.windows, shares[0])
    for place, step in enumerate(planned.heals):
        store = folder / f"{step.op}-{place}"
        with writing(store):
            store.mkdir(exist_ok=True)
        if isinstance(step, RefitStep):
            healed = _refitted(healed, step, planned, texts, held_out, store)
        elif isinstance(step, Ternary):
            healed = _ternarised(healed, step, planned, texts, held_out, store)
        else:
            assert isinstance(step, DistillStep)
            healed = _distilled(healed, step, planned, texts, held_out, store, logs)
    if planned.spec.block_transformer:
        whole = filled_model(planned.written.student, healed.weights, texts.dtype, options.device)
        judged = prove_whole(whole, texts.runner, texts.windows[held_out], options.batch)
        return replace(healed, evaluation=replace(judged, bits=texts.bits(scored_by(whole), texts.windows[held_out])))
    student = texts.walker(normalised(planned.written.student), healed.weights)
    found = prove(student, texts.runner, texts.windows[held_out], texts.tokenizer, options.batch)
    if isinstance(found, Evaluation):
        found = replace(found, bits=texts.bits(walked(student, options.batch), texts.windows[held_out]))
    return replace(healed, evaluation=found)


def _refitted(healed: Healed, step: RefitStep, planned: Planned, texts: Texts, held_out: Tensor, store: Path) -> Healed:
    student = normalised(planned.written.student)
    batches = Batches.of(texts.windows, held_out, texts.options.batch, texts.runner.padding)
    options = RefitOptions(step.ridges, step.align, step.align_ridge, step.join, step.join_ridge)
    shared = (planned.parent.spec, planned.spec, batches, options, LayerStore(store))
    if planned.spec.block_transformer:
        whole = filled_model(student, healed.weights, texts.dtype, texts.options.device)
        for parameter in whole.parameters():
            # Tensors of a checkpoint are views of its files, and two modules may hold the same one.
            parameter.data = parameter.data.clone()
        made = refit_block_transformer(Context(texts.runner, whole, *shared))
    else:
        made = refit(Context(texts.runner, texts.walker(student, healed.weights), *shared))
    return replace(healed, weights=overlay(healed.weights, made.files), updates=(*healed.updates, *made.updates))


def _ternarised(healed: Healed, step: Ternary, planned: Planned, texts: Texts, held_out: Tensor, store: Path) -> Healed:
    student = LayerRunner(normalised(planned.written.student), healed.weights, texts.dtype, texts.options.device)
    subject = Subject(planned.spec, planned.parent.family, frozenset(planned.weights))
    made = ternarise(
        TernaryContext(
            student,
            step.chosen(subject),
            Batches.of(texts.windows, held_out, texts.options.batch),
            step.grid,
            step.ridge if step.align else (),
            LayerStore(store),
            _new_norms(planned) if step.sub_norm else {},
        )
    )
    return replace(healed, weights=overlay(healed.weights, made.files), ternary=(*healed.ternary, *made.linears))


def _new_norms(planned: Planned) -> dict[int, list[str]]:
    """Block -> output projections inside it with a norm that the parent does not have."""
    before, found = planned.parent.spec.layers, {}
    for index, layer in enumerate(planned.spec.layers):
        new = set(layer.sub_normed) - set(before[layer.parents[0]].sub_normed)
        found[index] = [path for path, (part, _) in planned.parent.family.sub_norms.items() if part in new]
    return found


def _distilled(
    healed: Healed, step: DistillStep, planned: Planned, texts: Texts, held_out: Tensor, store: Path, logs: Path
) -> Healed:
    began = time.monotonic()
    case = Case(
        parent=texts.runner,
        parent_config=planned.parent.config,
        parent_spec=planned.parent.spec,
        fingerprint=texts.parent_key,
        config=normalised(planned.written.student),
        spec=planned.spec,
        weights=healed.weights,
        text=texts.training(step, texts.windows[~held_out]),
        held_out=texts.windows[held_out],
        folder=store,
        logs=logs,
        device=texts.options.device,
        batch=texts.options.batch,
        say=texts.options.say,
    )
    made = distill(case, step, began)
    return replace(healed, weights=overlay(healed.weights, made.files), trainings=(*healed.trainings, made))


def _held_out(windows: Tensor, fraction: float) -> Tensor:
    """Mask [S] of the sequences that only judge, spread evenly over the text."""
    rows = torch.arange(len(windows))[:, None]
    _, held = split(rows, fraction)
    mask = torch.zeros(len(windows), dtype=torch.bool)
    mask[held.flatten()] = True
    return mask


def write_story(
    stage: Stage,
    planned: Planned,
    recipe: str,
    healed: Healed,
    texts: Texts,
    missed: list[str],
    source: Checkpoint,
) -> None:
    """Everything but the weights; tokenizer and the like are `source`'s."""
    write_beside(stage, planned.written, source)
    stage.write_file("recipe.yaml", recipe)
    measured = healed.evaluation.to_dict() if healed.evaluation else None
    updates, trainings = list(healed.updates), list(healed.trainings)
    surgery = {
        "llmsurgeon": __version__,
        "parent": planned.parent.name,
        "format": planned.written.format,
        "before": planned.before.to_dict(),
        "after": planned.after.to_dict(),
        "evaluation": measured,
        "calibration": texts.description,
        "gate_missed": missed,
        **({"warning": warning} if (warning := collapse(measured)) else {}),
        "refit": [update.to_dict() for update in updates],
        "parents": [list(layer.parents) for layer in planned.spec.layers],
        **({"ternary": [entry.to_dict() for entry in healed.ternary]} if healed.ternary else {}),
        **({"distill": [training.to_dict() for training in trainings]} if trainings else {}),
    }
    if trainings:
        stage.write_file("loss.jsonl", "".join(json.dumps(line) + "\n" for made in trainings for line in made.log))
        stage.write_file("report.html", html_curves(Path(stage.out).name, trainings))
    known = (planned.parent.name, planned.recipe.calibration.text, planned.recipe.calibration.dataset)
    surgery = everywhere(surgery, lambda text: without_folders(text, *known))
    stage.write_file("surgery.json", json.dumps(surgery, indent=2) + "\n")
    ternary = [ternary_summary(healed.ternary)] if healed.ternary else []
    notes = [
        *planned.notes,
        *ternary,
        *_refit_note(updates),
        *(training.note for training in trainings),
    ]
    card = model_card(
        planned.parent.name,
        planned.written,
        planned.before,
        planned.after,
        recipe,
        measured,
        without_folders(texts.description, *known),
        notes,
        missed,
        source.companions.code,
    )
    stage.write_file("README.md", card)


def _refit_note(updates: list[Update]) -> list[str]:
    if not updates:
        return []
    made = [update for update in updates if update.accepted]
    refused = len(updates) - len(made)
    note = f"Refit: {len(made)} closed-form updates made"
    return [note + (f", {refused} refused because they did not lower the held-out error." if refused else ".")]
