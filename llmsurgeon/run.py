"""A recipe, run: open, resolve, plan, check on the meta device, heal, write, prove."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsurgeon import __version__
from llmsurgeon import recipe as recipe_file
from llmsurgeon.analysis.calibration import Calibration, calibration_tokens, split
from llmsurgeon.analysis.walk import LayerRunner, Variant, walk
from llmsurgeon.card import model_card
from llmsurgeon.checkpoint.source import Checkpoint, open_checkpoint, read_config
from llmsurgeon.checkpoint.transform import TransformedWeights, rebase
from llmsurgeon.checkpoint.writer import Stage
from llmsurgeon.errors import GateFailed, SurgeryError
from llmsurgeon.evaluation.evaluate import Evaluation, evaluate_hidden
from llmsurgeon.families import Family, family_of
from llmsurgeon.formats.loading import load_tokenizer, model_of
from llmsurgeon.formats.models import canonical, check_shapes, empty_model, expected_shapes, legacy, normalised
from llmsurgeon.formats.write import Written, write_config
from llmsurgeon.healing.refit import Fit, Refit, RefitOptions, overlay
from llmsurgeon.operations import Step, Subject
from llmsurgeon.operations.refit import Refit as RefitStep
from llmsurgeon.recipe import Gate, Recipe, dump
from llmsurgeon.scores import compute_scores
from llmsurgeon.spec import ModelSpec
from llmsurgeon.summary import Costs, costs

Say = Callable[[str], None]

# What an edit that is computed a block of rows at a time holds, in float32 with its inputs.
STREAMED_BYTES = 8 << 20


@dataclass(frozen=True)
class Patient:
    """The parent on the table. `weights` has canonical names; without `checkpoint` it is on the meta device only."""

    name: str
    config: dict[str, Any]
    family: Family
    spec: ModelSpec
    weights: Mapping[str, Tensor]
    checkpoint: Checkpoint | None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype most numbers are stored in."""
        meta = self.meta()
        sizes: dict[torch.dtype, int] = {}
        for tensor in meta.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
        return max(sizes, key=lambda dtype: sizes[dtype])

    def subject(self, scores: Mapping[str, Any]) -> Subject:
        """The parent as operations see it."""
        return Subject(self.spec, self.family, frozenset(self.weights), scores)

    def meta(self) -> Mapping[str, Tensor]:
        """Names, shapes and dtypes."""
        return self.weights if self.checkpoint is None else rebase(self.weights, self.checkpoint.meta())


def open_patient(model: str, revision: str | None = None) -> Patient:
    """Open a checkpoint and hold its tensors against its config.

    Raises:
        SurgeryError: unsupported family, impossible config, or tensors that differ from what it promises.
    """
    checkpoint = open_checkpoint(model, revision=revision)
    config = normalised(checkpoint.config)
    family = family_of(config)
    spec = family.describe(config)
    weights = canonical(checkpoint, family, spec.tied)
    patient = Patient(checkpoint.name, config, family, spec, weights, checkpoint)
    check_shapes(shapes_of(patient.meta()), expected_shapes(empty_model(config)), checkpoint.name)
    return patient


def open_config(model: str, revision: str | None = None) -> Patient:
    """The same from config.json alone: enough for a plan."""
    raw = read_config(model, revision)
    config = normalised(raw)
    family = family_of(config)
    dtype = getattr(torch, str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16").removeprefix("torch."))
    shapes = expected_shapes(empty_model(config))
    weights = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    return Patient(model, config, family, family.describe(config), weights, None)


@dataclass(frozen=True)
class Planned:
    """Everything that is known before a tensor is read."""

    patient: Patient
    recipe: Recipe
    spec: ModelSpec
    weights: Mapping[str, Tensor]
    written: Written
    refits: tuple[RefitStep, ...]
    notes: tuple[str, ...]
    before: Costs
    after: Costs

    @property
    def peak_bytes(self) -> int:
        """The most that one computed tensor and what it is made from take, when weights are edited."""
        meta = self.weights if self.patient.checkpoint is None else rebase(self.weights, self.patient.checkpoint.meta())
        return max((_group_bytes(meta, name) for name in meta), default=0)


def plan(patient: Patient, recipe: Recipe, scores: Mapping[str, Any]) -> Planned:
    """Resolve and plan every step, choose the format, and check the result on the meta device."""
    family = patient.family
    subject = patient.subject(scores)
    weights: Mapping[str, Tensor] = patient.weights
    resolved: list[Step] = []
    notes: list[str] = []
    for step in recipe.steps:
        if resolved and resolved[-1].heals and not step.heals:
            raise SurgeryError(f"step {step.op} comes after {resolved[-1].op}: cuts come first, healing last")
        resolved.append(step.resolve(subject))
        planned = resolved[-1].plan(subject)
        weights = TransformedWeights(weights, planned.transforms)
        subject = subject.after(planned)
        notes += planned.notes
    written = write_config(subject.spec, family, patient.config, recipe.format)
    meta = weights if patient.checkpoint is None else rebase(weights, patient.checkpoint.meta())
    check_shapes(shapes_of(meta), expected_shapes(empty_model(written.config)), "the planned checkpoint")
    size = patient.dtype.itemsize
    return Planned(
        patient=patient,
        recipe=recipe.model_copy(update={"steps": tuple(resolved)}),
        spec=subject.spec,
        weights=weights,
        written=written,
        refits=tuple(step for step in resolved if isinstance(step, RefitStep)),
        notes=tuple(notes),
        before=costs(patient.spec, family, shapes_of(patient.meta()), size),
        after=costs(subject.spec, family, shapes_of(meta), size),
    )


@dataclass(frozen=True)
class Options:
    """Where and how to run; nothing here changes what is computed but dtype and device."""

    device: str = "cpu"
    dtype: torch.dtype | None = None
    overwrite: bool = False
    max_shard_size: str = "5GB"
    batch: int = 8
    say: Say = field(default=lambda line: None)


@dataclass(frozen=True)
class Outcome:
    """What a run made."""

    out: Path
    planned: Planned
    fits: tuple[Fit, ...]
    evaluation: Evaluation | None
    gate: tuple[str, ...]


def run(recipe: Recipe, model: str, out: str, options: Options, revision: str | None = None) -> Outcome:
    """Run a recipe on a model and write the result to `out`.

    Raises:
        SurgeryError: bad input; nothing is written to `out`.
        GateFailed: the result misses the recipe's gate; it is written all the same, and its card says so.
    """
    patient = open_patient(model, revision)
    assert patient.checkpoint is not None
    source = patient.checkpoint.path
    Stage.check(out, overwrite=options.overwrite, sources=(source,))
    wanted = max([step.tokens or 0 for step in recipe.steps if isinstance(step, RefitStep)] or [0])
    texts = Texts(patient, recipe.calibration, wanted or recipe.calibration.tokens, options)
    needed = frozenset(name for step in recipe.steps for name in step.needs())
    scores = (
        compute_scores(needed, texts.runner, texts.windows, recipe.steps, patient.subject, options.batch)
        if needed
        else {}
    )
    planned = plan(patient, recipe, scores)
    resolved = dump(planned.recipe.model_copy(update={"model": model}))
    fingerprint = hashlib.sha256(
        json.dumps([__version__, resolved, patient.checkpoint.fingerprint, str(options.dtype)]).encode()
    ).hexdigest()
    with Stage.open(
        out,
        fingerprint=fingerprint,
        overwrite=options.overwrite,
        sources=(source,),
        needed_bytes=planned.after.disk_bytes,
    ) as stage:
        weights, fits, evaluation = _heal_and_prove(planned, texts, options, stage)
        if planned.written.format == "native":
            weights = legacy(weights, patient.family)
        stage.write_weights(weights, max_shard_size=options.max_shard_size)
        missed = _missed(recipe.gate, evaluation)
        _write_beside(stage, planned, resolved, evaluation, texts, fits, missed)
        stage.commit()
    outcome = Outcome(Path(out), planned, tuple(fits), evaluation, tuple(missed))
    if missed:
        raise GateFailed(f"{out} is written, but it misses the recipe's gate: " + "; ".join(missed))
    return outcome


class Texts:
    """Calibration text and the parent's runner, made when first asked for."""

    def __init__(self, patient: Patient, wanted: recipe_file.Calibration, tokens: int, options: Options) -> None:
        self.patient, self.options = patient, options
        self.calibration = Calibration(wanted.text, wanted.dataset, tokens, wanted.sequence_length, wanted.seed)
        self.description = "none"
        self._windows: Tensor | None = None
        self._runner: LayerRunner | None = None

    @property
    def windows(self) -> Tensor:
        """Calibration tokens [S, T]."""
        if self._windows is None:
            checkpoint = self.patient.checkpoint
            assert checkpoint is not None
            self._windows = calibration_tokens(
                self.patient.name,
                load_tokenizer(str(checkpoint.path)),
                text=self.calibration.text,
                dataset=self.calibration.dataset,
                tokens=self.calibration.tokens,
                sequence_length=self.calibration.sequence_length,
                seed=self.calibration.seed,
                model=lambda: model_of(checkpoint, dtype=self.dtype, device=self.options.device),
                fingerprint=checkpoint.fingerprint,
            )
            self.description = self.calibration.describe(self._windows)
            self.options.say(self.description)
        return self._windows

    @property
    def dtype(self) -> torch.dtype:
        """What activations are computed in: the checkpoint's dtype, bfloat16 for float16 on a CPU."""
        stored = self.options.dtype or self.patient.dtype
        return torch.bfloat16 if stored == torch.float16 and self.options.device == "cpu" else stored

    @property
    def runner(self) -> LayerRunner:
        """The parent, layer by layer."""
        if self._runner is None:
            self._runner = LayerRunner(self.patient.config, self.patient.weights, self.dtype, self.options.device)
        return self._runner


def _heal_and_prove(
    planned: Planned, texts: Texts, options: Options, stage: Stage
) -> tuple[Mapping[str, Tensor], list[Fit], Evaluation | None]:
    """Refit where the recipe asks for it; measure on held-out text where there is text."""
    if not planned.refits and planned.recipe.gate is None:
        return planned.weights, [], None
    weights, fits = planned.weights, []
    step = planned.refits[0] if planned.refits else RefitStep()
    held_out = _held_out(texts.windows, step.held_out)
    config = normalised(planned.written.config)
    for place, refit in enumerate(planned.refits):
        student = LayerRunner(config, weights, texts.dtype, options.device)
        store = stage.scratch / f"refit-{place}"
        store.mkdir(exist_ok=True)
        fit = Refit(
            texts.runner,
            student,
            planned.patient.spec,
            planned.spec,
            texts.windows,
            held_out,
            RefitOptions(refit.ridges, refit.align, refit.align_ridge, refit.join, refit.join_ridge, options.batch),
            store,
        )
        weights = overlay(weights, fit.run())
        fits += fit.fits
    tokens = texts.windows[held_out]
    student = LayerRunner(config, weights, texts.dtype, options.device)
    mine = walk(student, tokens, [Variant()], batch=options.batch)[0]
    theirs = walk(texts.runner, tokens, [Variant()], batch=options.batch)[0]
    evaluation = evaluate_hidden(
        tokens,
        lambda row: student.final(mine[row].to(options.device)),
        lambda row: texts.runner.final(theirs[row].to(options.device)),
    )
    return weights, fits, evaluation


def _held_out(windows: Tensor, fraction: float) -> Tensor:
    """Mask [S] of the sequences that only judge, spread evenly over the text."""
    rows = torch.arange(len(windows))[:, None]
    _, held = split(rows, fraction)
    mask = torch.zeros(len(windows), dtype=torch.bool)
    mask[held.flatten()] = True
    return mask


def _missed(gate: Gate | None, evaluation: Evaluation | None) -> list[str]:
    if gate is None or evaluation is None:
        return []
    ratio, kl, top1 = evaluation.perplexity_ratio, evaluation.kl, evaluation.top1_agreement
    assert ratio is not None and kl is not None and top1 is not None
    missed = []
    if gate.max_perplexity_ratio is not None and not ratio <= gate.max_perplexity_ratio:
        missed.append(f"perplexity ratio {ratio:.3f}, at most {gate.max_perplexity_ratio} wanted")
    if gate.max_kl is not None and not kl <= gate.max_kl:
        missed.append(f"KL {kl:.3f} nats a token, at most {gate.max_kl} wanted")
    if gate.min_top1_agreement is not None and not top1 >= gate.min_top1_agreement:
        missed.append(f"top-1 agreement {top1:.3f}, at least {gate.min_top1_agreement} wanted")
    return missed


def _write_beside(
    stage: Stage,
    planned: Planned,
    recipe: str,
    evaluation: Evaluation | None,
    texts: Texts,
    fits: list[Fit],
    missed: list[str],
) -> None:
    """Everything but the weights."""
    config = {**planned.written.config, "transformers_version": _transformers_version()}
    stage.write_file("config.json", json.dumps(_plain(config), indent=2) + "\n")
    assert planned.patient.checkpoint is not None
    for path in planned.patient.checkpoint.tokenizer_files():
        stage.copy_file(path)
    for path in planned.written.code:
        stage.copy_file(path)
    stage.write_file("recipe.yaml", recipe)
    measured = evaluation.to_dict() if evaluation else None
    surgery = {
        "llmsurgeon": __version__,
        "parent": planned.patient.name,
        "format": planned.written.format,
        "before": planned.before.to_dict(),
        "after": planned.after.to_dict(),
        "evaluation": measured,
        "calibration": texts.description,
        "gate_missed": missed,
        "refit": [vars(fit) for fit in fits],
    }
    stage.write_file("surgery.json", json.dumps(surgery, indent=2) + "\n")
    notes = [*planned.notes, *(_fit_note(fits) if fits else [])]
    card = model_card(
        planned.patient.name,
        planned.written,
        planned.before,
        planned.after,
        recipe,
        measured,
        texts.description,
        notes,
        missed,
    )
    stage.write_file("README.md", card)


def _fit_note(fits: list[Fit]) -> list[str]:
    made = [fit for fit in fits if fit.accepted]
    refused = len(fits) - len(made)
    note = f"Refit: {len(made)} closed-form updates made"
    return [note + (f", {refused} refused because they did not lower the held-out error." if refused else ".")]


def shapes_of(meta: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name -> shape."""
    return {name: tuple(meta[name].shape) for name in meta}


def _group_bytes(meta: Mapping[str, Tensor], name: str) -> int:
    """Bytes of a computed tensor and of its sources; 0 where bytes are copied."""
    if not isinstance(meta, TransformedWeights) or meta.origin(name) is not None:
        return 0
    transform = next((t for t in meta.transforms if name in t.targets and t.fn), None)
    if transform is None:
        inner = next((t.sources[0] for t in meta.transforms if name in t.targets), name)
        return _group_bytes(meta.base, inner)
    if inspect.isgeneratorfunction(transform.fn):
        return STREAMED_BYTES
    tensors = [meta[name], *(meta.base[source] for source in transform.sources)]
    return sum(t.numel() * t.dtype.itemsize for t in tensors)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _transformers_version() -> str:
    from importlib.metadata import version

    return version("transformers")


def copy_checkpoint(model: str, out: str, overwrite: bool = False) -> Path:
    """Write a checkpoint as it is as a folder of safetensors: what a GGUF needs before other tools read it.

    Raises:
        SurgeryError: as `run`.
    """
    patient = open_patient(model)
    checkpoint = patient.checkpoint
    assert checkpoint is not None
    size = sum(t.numel() * t.dtype.itemsize for t in patient.meta().values())
    with Stage.open(
        out, fingerprint=checkpoint.fingerprint, overwrite=overwrite, sources=(checkpoint.path,), needed_bytes=size
    ) as stage:
        stage.write_weights(patient.weights)
        stage.write_file("config.json", json.dumps(_plain(checkpoint.config), indent=2) + "\n")
        for path in checkpoint.tokenizer_files():
            stage.copy_file(path)
        return stage.commit()
