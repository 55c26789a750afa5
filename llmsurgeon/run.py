"""A recipe, run: open, resolve, plan, check on the meta device, heal, write, prove."""

from __future__ import annotations

import hashlib
import inspect
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmsurgeon import __version__
from llmsurgeon import recipe as recipe_file
from llmsurgeon.analysis.calibration import Calibration, calibration_tokens, split
from llmsurgeon.analysis.self_text import SelfText, cached_self_text
from llmsurgeon.analysis.walk import LayerRunner
from llmsurgeon.card import collapse, model_card
from llmsurgeon.checkpoint.source import Checkpoint, open_checkpoint, read_config
from llmsurgeon.checkpoint.transform import TransformedWeights, rebase
from llmsurgeon.checkpoint.writer import Stage
from llmsurgeon.errors import GateFailed, SurgeryError
from llmsurgeon.evaluation.encoders import EncoderEvaluation
from llmsurgeon.evaluation.evaluate import Evaluation
from llmsurgeon.families import Family, family_of
from llmsurgeon.formats.bitnet import one_scale, packing_of
from llmsurgeon.formats.loading import load_tokenizer, model_of
from llmsurgeon.formats.models import canonical, check_shapes, empty_model, expected_shapes, filled_model, normalised
from llmsurgeon.formats.towers import Tower, tower_of
from llmsurgeon.formats.write import FormatName, Written, write_beside, write_config
from llmsurgeon.healing.curve import html_curves
from llmsurgeon.healing.data import Rows, training_rows
from llmsurgeon.healing.distill import Case, Distilled, distill
from llmsurgeon.healing.refit import Fit, Refit, RefitOptions, overlay
from llmsurgeon.healing.refit_block import BlockRefit
from llmsurgeon.healing.ternary import Ternarise, Ternarised, TernaryOptions
from llmsurgeon.healing.ternary import summary as ternary_summary
from llmsurgeon.healing.training import several
from llmsurgeon.operations import Step, Subject
from llmsurgeon.operations.base import all_kept, assemble
from llmsurgeon.operations.distill import Distill as DistillStep
from llmsurgeon.operations.refit import Refit as RefitStep
from llmsurgeon.operations.ternary import Ternary, linears_of, refuse_ternary
from llmsurgeon.proof import check_gate, missed, prove, prove_whole
from llmsurgeon.recipe import Recipe, dump
from llmsurgeon.scores import compute_scores
from llmsurgeon.spec import ModelSpec
from llmsurgeon.summary import Costs, costs
from llmsurgeon.ternary import is_ternary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Say = Callable[[str], None]

# The score that padded sentences are measured without their padding for.
SENTENCE_SCORE = "fff"

# What an edit that is computed a block of rows at a time holds, in float32 with its inputs.
STREAMED_BYTES = 8 << 20


@dataclass(frozen=True)
class Patient:
    """The parent on the table. `weights` has canonical names; without `checkpoint` it is on the meta device only.

    `model_type` is what config.json says; `config` is what this tool reads it as. Of a vision-language checkpoint
    config, family and spec are those of the text tower, and `weights` holds the rest of the file, too.
    """

    name: str
    config: dict[str, Any]
    family: Family
    spec: ModelSpec
    weights: Mapping[str, Tensor]
    checkpoint: Checkpoint | None
    model_type: str
    tower: Tower | None = None

    @property
    def beside(self) -> frozenset[str]:
        """Names of the tensors that only go along with a text tower."""
        return self.tower.beside if self.tower else frozenset()

    def form(self, spec: ModelSpec, wanted: FormatName) -> Written:
        """The form in which a model of this description is written.

        Raises:
            SurgeryError: the format that is asked for cannot express it.
        """
        write = self.tower.write if self.tower else write_config
        return write(spec, self.family, self.config, wanted)

    def costs(self, spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]]) -> Costs:
        """Costs of a model with these tensors; what goes along counts as parameters and on the disk alone."""
        size = self.dtype.itemsize
        own = {name: shape for name, shape in shapes.items() if name not in self.beside}
        numbers = sum(prod(shapes[name]) for name in self.beside if name in shapes)
        made = costs(spec, self.family, own, size)
        return replace(made, parameters=made.parameters + numbers, disk_bytes=made.disk_bytes + numbers * size)

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
    refuse_quantised(checkpoint.config, checkpoint.name)
    tower = tower_of(checkpoint.config, checkpoint)
    config = normalised(tower.text if tower else checkpoint.config)
    family = family_of(config)
    spec = family.describe(config)
    weights = canonical(tower.inner(checkpoint) if tower else checkpoint, family, spec.tied)
    model_type = checkpoint.config["model_type"]
    patient = Patient(checkpoint.name, config, family, spec, weights, checkpoint, model_type, tower)
    expected = expected_shapes(empty_model(config))
    check_shapes(shapes_of(patient.meta()), expected, checkpoint.name, family, patient.beside)
    return patient


def refuse_quantised(config: Mapping[str, Any], name: str) -> None:
    """Raise SurgeryError for a checkpoint whose weights are packed or scaled by a quantizer."""
    found = config.get("quantization_config")
    if found:
        raise SurgeryError(
            f"{name}: its weights are quantised already (quantization_config: {found.get('quant_method')}), and "
            "operations work on plain numbers; take the checkpoint that it was made from"
        )


def open_config(model: str, revision: str | None = None) -> Patient:
    """The same from config.json alone: enough for a plan."""
    raw = read_config(model, revision)
    refuse_quantised(raw, model)
    tower = tower_of(raw)
    config = normalised(tower.text if tower else raw)
    family = family_of(config)
    dtype = getattr(torch, str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16").removeprefix("torch."))
    shapes = expected_shapes(empty_model(config))
    weights = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    return Patient(model, config, family, family.describe(config), weights, None, raw["model_type"], tower)


@dataclass(frozen=True)
class Planned:
    """Everything that is known before a tensor is read.

    `weights` are the student's own, `meta` what will be written, on the meta device.
    """

    patient: Patient
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


def check_recipe(patient: Patient, recipe: Recipe) -> None:
    """Raise SurgeryError for what needs no planning to be refused."""
    check_gate(recipe.gate, patient.family)
    for step in recipe.steps:
        patient.subject({}).check(step.op)
        if patient.tower and step.op == "block":
            raise SurgeryError(
                f"{patient.name}: block is for text models; this is the text tower of a vision-language model "
                f"({patient.model_type}), whose images enter as embeddings that no block of tokens holds"
            )
        if patient.tower and step.op == "distill":
            raise SurgeryError(
                f"{patient.name}: distill saves the text tower alone, without the rest of this vision-language model "
                f"({patient.model_type}); heal it with refit"
            )
    if recipe.calibration.sentences:
        others = {name for step in recipe.steps for name in step.needs()} - {SENTENCE_SCORE}
        if not patient.family.encoder or others:
            raise SurgeryError(
                f"{patient.name}: calibration.sentences is for encoders, with fff, refit, distill and unscored steps"
                + (f"; here {', '.join(sorted(others))} would be measured on padding, too" if others else "")
            )
    if recipe.gate or any(step.needs() or step.heals for step in recipe.steps):
        _check_text(patient, recipe.calibration)


def refuse_ternary_parent(patient: Patient, recipe: Recipe) -> None:
    """Raise SurgeryError where a linear that is to become ternary is so already, or has no whole groups."""
    subject = patient.subject({})
    for step in (step for step in recipe.steps if isinstance(step, Ternary)):
        for index, names in step.chosen(subject).items():
            for name in names:
                full = patient.family.layer(index) + name
                weight = patient.weights[full]
                step.grid.group(weight.shape[0 if patient.family.transposed else 1])
                refuse_ternary(full, weight, patient.family.transposed)


def _check_text(patient: Patient, wanted: recipe_file.Calibration) -> None:
    if patient.family.encoder and not (wanted.text or wanted.dataset):
        raise SurgeryError(
            f"{patient.name}: {patient.family.model_type} is an encoder and cannot sample text from itself; "
            "give --text FILE or --dataset NAME (in a recipe: under calibration). Only cuts by layer or by weights "
            "need none, without refit (--no-refit) and gate"
        )


def check_length(patient: Patient, length: int, setting: str) -> None:
    """Raise SurgeryError where sequences of `length` tokens, as `setting` asks for, exceed the model's positions."""
    limit = patient.spec.max_positions
    if limit and length > limit:
        raise SurgeryError(f"{patient.name}: {setting} is {length}, and the model has {limit} positions; lower it")


def plan(patient: Patient, recipe: Recipe, scores: Mapping[str, Any]) -> Planned:
    """Resolve and plan every step, choose the format, and check the result on the meta device."""
    check_recipe(patient, recipe)
    family = patient.family
    subject = patient.subject(scores)
    weights: Mapping[str, Tensor] = patient.weights
    resolved: list[Step] = []
    notes: list[str] = []
    for step in recipe.steps:
        if resolved and resolved[-1].heals and not step.heals:
            raise SurgeryError(f"step {step.op} comes after {resolved[-1].op}: cuts come first, healing last")
        if not (step.heals or step.op == "ternary") and any(done.op == "ternary" for done in resolved):
            raise SurgeryError(f"step {step.op} comes after ternary: what it joins or folds would not stay ternary")
        others = [done for done in resolved if isinstance(done, Ternary)]
        if isinstance(step, Ternary) and others and any(each.sub_norm for each in (*others, step)):
            raise SurgeryError("ternary: a step with sub_norm is the only ternary step of a recipe; run two recipes")
        resolved.append(step.resolve(subject))
        planned = resolved[-1].plan(subject)
        weights = TransformedWeights(weights, planned.transforms)
        subject = subject.after(planned)
        notes += planned.notes
    subject, weights = without_empty_blocks(subject, weights)
    written = patient.form(subject.spec, recipe.format)
    meta = written.fit(weights if patient.checkpoint is None else rebase(weights, patient.checkpoint.meta()))
    expected = expected_shapes(empty_model(written.config))
    check_shapes(shapes_of(meta), expected, "the planned checkpoint", family, patient.beside)
    after = patient.costs(written.spec, shapes_of(meta))
    if written.format == "bitnet":
        packing = packing_of(written.config, meta, ternary_names(resolved, subject))
        written = replace(written, packing=packing)
        after = replace(after, disk_bytes=after.disk_bytes - packing.saved(meta))
    return Planned(
        patient=patient,
        recipe=recipe.model_copy(update={"steps": tuple(resolved)}),
        spec=subject.spec,
        weights=weights,
        meta=meta,
        written=written,
        heals=tuple(step for step in resolved if step.heals),
        notes=tuple(notes),
        before=patient.costs(patient.spec, shapes_of(patient.meta())),
        after=after,
    )


def ternary_by_block(model: str, revision: str | None = None) -> list[tuple[str, ...]] | None:
    """Paths inside each block of the linears whose weights are ternary, told by a sample of their rows.

    None where there are no weights to look at: of hub ids, lone config.json files, and GGUF files, which are decoded.
    """
    if not Path(model).is_dir():
        return None
    try:
        patient = open_patient(model, revision)
    except SurgeryError:
        return None
    subject, family = patient.subject({}), patient.family
    found = []
    for index in range(len(patient.spec.blocks)):
        names = () if patient.spec.blocks[index].branches else linears_of(subject, index)
        weights = {name: patient.weights[family.layer(index) + name] for name in names}
        looked = {name: w.T if family.transposed else w for name, w in weights.items()}
        found.append(tuple(n.removesuffix(".weight") for n, w in looked.items() if is_ternary(w[:: len(w) // 64 + 1])))
    return found


def foreseen(patient: Patient, recipe: Recipe) -> dict[str, Any]:
    """For a dry run: what shapes alone say of the scores that the recipe's steps ask for."""
    scores: dict[str, Any] = {}
    for step in recipe.steps:
        for name, values in step.foresee(patient.subject({})).items():
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


def without_empty_blocks(subject: Subject, weights: Mapping[str, Tensor]) -> tuple[Subject, Mapping[str, Tensor]]:
    """The same model without blocks that only pass their input on, as published Nemotron-NAS checkpoints have them."""
    if not any(block.empty for block in subject.spec.blocks):
        return subject, weights
    made = assemble(subject, all_kept(subject))
    return subject.after(made), TransformedWeights(weights, made.transforms)


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
    evaluation: Evaluation | EncoderEvaluation | None
    gate: tuple[str, ...]
    trainings: tuple[Distilled, ...] = ()


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
    if several():
        raise SurgeryError(
            "run is one process: cut and refit first, then `accelerate launch -m llmsurgeon heal OUT --parent MODEL`"
        )
    check_recipe(patient, recipe)
    refuse_ternary_parent(patient, recipe)
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
    job = [__version__, job_of(planned.recipe, model), patient.checkpoint.fingerprint, str(options.dtype)]
    with Stage.open(
        out,
        fingerprint=hashlib.sha256(json.dumps(job).encode()).hexdigest(),
        overwrite=options.overwrite,
        sources=(source,),
        needed_bytes=planned.after.disk_bytes,
    ) as stage:
        healed = heal_and_prove(planned, texts, options, stage.scratch, logs_of(out))
        weights = planned.written.published(healed.weights, patient.family)
        stage.write_weights(weights, max_shard_size=options.max_shard_size)
        short = missed(recipe.gate, healed.evaluation)
        write_story(stage, planned, resolved, healed, texts, short, patient.checkpoint)
        stage.commit()
    outcome = Outcome(Path(out), planned, healed.fits, healed.evaluation, tuple(short), healed.trainings)
    if short:
        raise GateFailed(f"{out} is written, but it misses the recipe's gate: " + "; ".join(short))
    return outcome


def job_of(recipe: Recipe, model: str) -> str:
    """What tells a job from another; a run that goes on may change the rest."""
    return dump(recipe.model_copy(update={"model": model, "steps": tuple(step.job() for step in recipe.steps)}))


def logs_of(out: str) -> Path:
    """The folder that trackers write to: it stays whether OUT appears or not."""
    return Path(out).expanduser().resolve().with_name(f"{Path(out).name}-logs")


class Texts:
    """Calibration text and the parent's runner, made when first asked for."""

    def __init__(self, patient: Patient, wanted: recipe_file.Calibration, tokens: int, options: Options) -> None:
        self.patient, self.options, self.wanted = patient, options, wanted
        self.calibration = Calibration(
            wanted.text, wanted.dataset, tokens, wanted.sequence_length, wanted.seed, wanted.sentences
        )
        self.description = "none"
        self._windows: Tensor | None = None
        self._runner: LayerRunner | None = None

    @property
    def windows(self) -> Tensor:
        """Calibration tokens [S, T]."""
        if self._windows is None:
            _check_text(self.patient, self.wanted)
            checkpoint = self.patient.checkpoint
            assert checkpoint is not None
            self._windows = calibration_tokens(
                self.patient.name,
                self.tokenizer(),
                text=self.calibration.text,
                dataset=self.calibration.dataset,
                tokens=self.calibration.tokens,
                sequence_length=self.calibration.sequence_length,
                seed=self.calibration.seed,
                sentences=self.calibration.sentences,
                model=lambda: model_of(checkpoint, dtype=self.dtype, device=self.options.device),
                fingerprint=checkpoint.fingerprint,
            )
            setting = "calibration.sequence_length (--seq-len of analyze)"
            check_length(self.patient, self._windows.shape[1], setting)
            self.description = self.calibration.describe(self._windows)
            self.options.say(self.description)
        return self._windows

    def training(self, step: DistillStep, windows: Tensor) -> list[Rows]:
        """What a distillation trains on; `windows` where nothing but the parent's own text is at hand."""
        check_length(self.patient, step.sequence_length, "distill.sequence_length")
        checkpoint = self.patient.checkpoint
        assert checkpoint is not None
        tokenizer = self.tokenizer()

        def sample(tokens: int, length: int, seed: int) -> Tensor:
            load = lambda: model_of(checkpoint, dtype=self.dtype, device=self.options.device)  # noqa: E731
            return cached_self_text(load, tokenizer, checkpoint.fingerprint, SelfText(tokens, length, seed))

        rows = training_rows(
            step.sources, step.sequence_length, step.seed, self.calibration, windows, tokenizer, sample
        )
        for source in rows:
            self.options.say(f"training text: {source.tokens.size:,} tokens of {source.name}")
        return rows

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The parent's tokenizer."""
        assert self.patient.checkpoint is not None
        return load_tokenizer(str(self.patient.checkpoint.path))

    @property
    def dtype(self) -> torch.dtype:
        """What activations are computed in: the checkpoint's dtype, bfloat16 for float16 on a CPU."""
        stored = self.options.dtype or self.patient.dtype
        return torch.bfloat16 if stored == torch.float16 and self.options.device == "cpu" else stored

    @property
    def runner(self) -> LayerRunner:
        """The parent, layer by layer."""
        if self._runner is None:
            self._runner = self.walker(self.patient.config, self.patient.weights)
        return self._runner

    def walker(self, config: dict[str, Any], weights: Mapping[str, Tensor]) -> LayerRunner:
        """A model of this description on the calibration text, layer by layer."""
        padding = self.tokenizer().pad_token_id if self.calibration.sentences else None
        return LayerRunner(config, weights, self.dtype, self.options.device, padding)


@dataclass(frozen=True)
class Healed:
    """The student after healing, what was done to it, and how good it is on held-out text."""

    weights: Mapping[str, Tensor]
    fits: tuple[Fit, ...] = ()
    trainings: tuple[Distilled, ...] = ()
    evaluation: Evaluation | EncoderEvaluation | None = None
    ternary: tuple[Ternarised, ...] = ()


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
        return replace(healed, evaluation=prove_whole(whole, texts.runner, texts.windows[held_out], options.batch))
    student = texts.walker(normalised(planned.written.student), healed.weights)
    found = prove(student, texts.runner, texts.windows[held_out], texts.tokenizer, options.batch)
    return replace(healed, evaluation=found)


def _refitted(healed: Healed, step: RefitStep, planned: Planned, texts: Texts, held_out: Tensor, store: Path) -> Healed:
    specs = (planned.patient.spec, planned.spec)
    fit: Refit | BlockRefit
    if planned.spec.block_transformer:
        whole = filled_model(planned.written.student, healed.weights, texts.dtype, texts.options.device)
        for parameter in whole.parameters():
            # Tensors of a checkpoint are views of its files, and two modules may hold the same one.
            parameter.data = parameter.data.clone()
        ridges, batch = step.ridges, texts.options.batch
        fit = BlockRefit(texts.runner, whole, *specs, texts.windows, held_out, ridges, batch, store)
    else:
        student = texts.walker(normalised(planned.written.student), healed.weights)
        options = RefitOptions(
            step.ridges, step.align, step.align_ridge, step.join, step.join_ridge, texts.options.batch
        )
        fit = Refit(texts.runner, student, *specs, texts.windows, held_out, options, store)
    weights = overlay(healed.weights, fit.run())
    return replace(healed, weights=weights, fits=(*healed.fits, *fit.fits))


def _ternarised(healed: Healed, step: Ternary, planned: Planned, texts: Texts, held_out: Tensor, store: Path) -> Healed:
    student = LayerRunner(normalised(planned.written.student), healed.weights, texts.dtype, texts.options.device)
    subject = Subject(planned.spec, planned.patient.family, frozenset(planned.weights))
    options = TernaryOptions(step.grid, step.ridge if step.align else (), texts.options.batch)
    normed = _new_norms(planned) if step.sub_norm else {}
    work = Ternarise(student, step.chosen(subject), texts.windows, held_out, options, store, normed)
    weights = overlay(healed.weights, work.run())
    return replace(healed, weights=weights, ternary=(*healed.ternary, *work.made))


def _new_norms(planned: Planned) -> dict[int, list[str]]:
    """Block -> output projections inside it with a norm that the parent does not have."""
    before, found = planned.patient.spec.blocks, {}
    for index, block in enumerate(planned.spec.blocks):
        new = set(block.sub_normed) - set(before[block.parents[0]].sub_normed)
        found[index] = [path for path, (part, _) in planned.patient.family.sub_norms.items() if part in new]
    return found


def _distilled(
    healed: Healed, step: DistillStep, planned: Planned, texts: Texts, held_out: Tensor, store: Path, logs: Path
) -> Healed:
    began = time.monotonic()
    checkpoint = planned.patient.checkpoint
    assert checkpoint is not None
    case = Case(
        parent=texts.runner,
        parent_config=planned.patient.config,
        parent_spec=planned.patient.spec,
        fingerprint=checkpoint.fingerprint,
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
    fits, trainings = list(healed.fits), list(healed.trainings)
    surgery = {
        "llmsurgeon": __version__,
        "parent": planned.patient.name,
        "format": planned.written.format,
        "before": planned.before.to_dict(),
        "after": planned.after.to_dict(),
        "evaluation": measured,
        "calibration": texts.description,
        "gate_missed": missed,
        **({"warning": warning} if (warning := collapse(measured)) else {}),
        "refit": [vars(fit) for fit in fits],
        "parents": [list(block.parents) for block in planned.spec.blocks],
        **({"ternary": [vars(entry) for entry in healed.ternary]} if healed.ternary else {}),
        **({"distill": [training.to_dict() for training in trainings]} if trainings else {}),
    }
    if trainings:
        stage.write_file("loss.jsonl", "".join(json.dumps(line) + "\n" for made in trainings for line in made.log))
        stage.write_file("report.html", html_curves(Path(stage.out).name, trainings))
    stage.write_file("surgery.json", json.dumps(surgery, indent=2) + "\n")
    ternary = [ternary_summary(healed.ternary)] if healed.ternary else []
    notes = [*planned.notes, *ternary, *(_fit_note(fits) if fits else []), *(training.note for training in trainings)]
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
