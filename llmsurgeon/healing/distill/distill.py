"""Global distillation: the whole student, towards the parent's hidden states and next-token distributions.

B sequences, L tokens, D model width, V vocabulary, E block ends that carry a hidden-state loss.
"""

from __future__ import annotations

import importlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from llmsurgeon.checkpoint.kept import keep
from llmsurgeon.errors import SurgeryError
from llmsurgeon.evaluation.decoders import evaluate_hidden
from llmsurgeon.formats.models import empty_model, fill
from llmsurgeon.healing.distill.data import Corpus, Rows, without_overlap, without_sentences
from llmsurgeon.healing.distill.latent import install, packed, ternary_block
from llmsurgeon.healing.distill.losses import NextTokens, Target, chunked_kl, cosine_distance
from llmsurgeon.healing.distill.targets import (
    AHEAD,
    LiveTargets,
    StoredTargets,
    TappedModel,
    Targets,
    Wanted,
    distribution,
)
from llmsurgeon.healing.distill.training import LOG, Trainer, Training, engine
from llmsurgeon.healing.spans import changed, spans
from llmsurgeon.model.spec import ModelSpec
from llmsurgeon.model.ternary import is_ternary
from llmsurgeon.walk.runner import LayerRunner
from llmsurgeon.walk.variants import Variant
from llmsurgeon.walk.walk import walk

if TYPE_CHECKING:
    from llmsurgeon.operations.distill import Distill, Lora

MERGED = "merged.safetensors"


@dataclass(frozen=True)
class Case:
    """A student beside its parent, with what is needed to heal it.

    parent, parent_config, parent_spec: the parent layer by layer, its normalised config and description.
    fingerprint: names the parent as it computes: weights, dtype, kind of device, libraries.
    config, spec, weights: the student's; its blocks name the parent layers they stand for.
    text: what to train on; held_out: sequences [S, T] that only judge.
    folder: where checkpoints and results of this job are kept, through kills.
    logs: where trackers write.
    """

    parent: LayerRunner
    parent_config: dict[str, Any]
    parent_spec: ModelSpec
    fingerprint: str
    config: dict[str, Any]
    spec: ModelSpec
    weights: Mapping[str, Tensor]
    text: list[Rows]
    held_out: Tensor
    folder: Path
    logs: Path
    device: str = "cpu"
    batch: int = 8
    say: Callable[[str], None] = lambda line: None

    def changed(self, index: int, span: tuple[int, ...]) -> bool:
        """True where block `index`, which does the work of the parent's layers `span`, is not simply one of them."""
        family = self.parent.family
        shape = changed(self.spec.layers[index], span, self.parent_spec)
        return shape or ternary_block(self.weights, family.layer(index), family.transposed)

    def dense(self, name: str) -> Tensor | None:
        """The parent's tensor where the student has `name`, None where it has none of this shape."""
        family, wanted = self.parent.family, self.weights[name].shape
        if name.startswith(f"{family.layers}."):
            number, _, inside = name.removeprefix(f"{family.layers}.").partition(".")
            parents = self.spec.layers[int(number)].parents
            name = family.layer(parents[0]) + inside if len(parents) == 1 else ""
        found = self.parent.weights.get(name)
        return found if found is not None and found.shape == wanted else None

    def corpus(self, seed: int) -> Corpus:
        """The training text in its order from the beginning, rows that share text with the held-out sequences left out.

        Raises:
            SurgeryError: nothing is left of a source.
        """
        # Padding would be text that all sentences share.
        clean = without_overlap if self.parent.padding is None else without_sentences
        return Corpus(self.text, [clean(rows, self.held_out) for rows in self.text], seed)


class Distiller(nn.Module):
    """The student with its losses: what accelerate wraps, shards and replicates.

    Called with ids [B, L] and the parent's answers it gives the losses; with ids alone, the logits of the first row.
    """

    def __init__(
        self,
        student: TappedModel,
        targets: Targets,
        hidden: float,
        kl: float,
        cross_entropy: float = 0.0,
        hardening: float = 0.0,
    ) -> None:
        super().__init__()
        self.student, self.hidden, self.kl, self.cross_entropy = student, hidden, kl, cross_entropy
        self.hardening = hardening
        self._logits = targets.logits

    def forward(
        self, ids: Tensor, positions: Tensor | None = None, padding: int | None = None, **answers: Tensor
    ) -> dict[str, Tensor]:
        """`loss` and its parts; `positions` are those that carry the KL, all by default.

        `padding` is a block transformer's: so many masked places begin its first block, whose tokens nothing predicts.
        """
        ends, states_BLD = self.student(ids, **({} if padding is None else {"block_padding": padding}))
        if not self.training:
            return {"logits": self.student.logits(states_BLD[0])}
        losses: dict[str, Tensor] = {}
        if ends:
            distances = [cosine_distance(end, answers["hidden"][:, place]) for place, end in enumerate(ends)]
            losses["hidden"] = torch.stack(distances).mean()
        if padding is not None:
            first = self.student.model.config.block_transformer["block_length"] - 1 - padding
            ids, states_BLD = ids[:, first:], states_BLD[:, first:]
            answers = {name: values[:, first:] for name, values in answers.items()}
        if self.cross_entropy:
            target = next_tokens(ids)
            losses["cross_entropy"] = self._divergence(states_BLD[:, :-1], target)
        if self.kl:
            says = {name: values for name, values in answers.items() if name != "hidden"}
            if positions is not None:
                states_BLD = states_BLD[:, positions]
                says = {name: values[:, positions] for name, values in says.items()}
            losses["kl"] = self._divergence(states_BLD, distribution(says, self._logits))
        if self.hardening:
            losses["hardening"] = hardening_loss(self.student)
        weights = {name: getattr(self, name) for name in ("hidden", "kl", "cross_entropy", "hardening")}
        return weighted(losses, weights)

    def _divergence(self, states_BLD: Tensor, target: Callable[[slice], Target]) -> Tensor:
        head = list(self.student.model.get_output_embeddings().parameters())
        return chunked_kl(states_BLD.flatten(0, 1), self.student.logits, head, target)


def weighted(losses: dict[str, Tensor], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """The losses, and their weighted sum under `loss`."""
    return {**losses, "loss": torch.stack([weights[name] * value for name, value in losses.items()]).sum()}


def hardening_loss(student: nn.Module) -> Tensor:
    """Entropy of the decisions that the student's trees took in the last forward pass, summed over nodes."""
    # Modeling files are for checkpoints: reached by path, as formats/models.py does.
    loss: Tensor = importlib.import_module("llmsurgeon.modeling.surgeon_fff").hardening_loss(student)
    return loss


def next_tokens(ids_BL: Tensor) -> Callable[[slice], Target]:
    """Rows of the flattened batch, the last column left out -> the tokens that follow there."""
    following = ids_BL[:, 1:].flatten()
    return lambda rows: NextTokens(following[rows])


def build_student(case: Case, settings: Distill, dtype: torch.dtype) -> Any:
    """The student in memory, without dropout (the parent answered without), with adapters where asked for."""
    still = {key: 0.0 for key, value in case.config.items() if _is_dropout(key) and isinstance(value, float)}
    model = empty_model({**case.config, **still})
    fill(model, case.weights, dtype, "cpu")
    for parameter in model.parameters():
        # Tensors of a checkpoint are views of its files, which the parent may share.
        parameter.data = parameter.data.clone()
    model.train()
    if settings.trees:
        for module in model.modules():
            if hasattr(module, "region_leak"):
                module.temperature, module.region_leak = settings.trees.temperature, settings.trees.region_leak
    if settings.gradient_checkpointing:
        # The name is new in transformers 5; the older one warns there.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    moving = trainable(model, case, settings)
    if settings.lora is None:
        moving = install(
            model, moving, case.dense, lambda name: case.weights[name].dtype, case.parent.family.transposed
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in moving)
    if settings.lora is not None:
        _adapt(model, settings.lora, moving, settings.seed)
    return model


def _is_dropout(key: str) -> bool:
    return "dropout" in key or key.endswith("pdrop")


def trainable(model: Any, case: Case, settings: Distill) -> set[str]:
    """Names of the parameters that move.

    Raises:
        SurgeryError: a pattern fits no name, or nothing would move.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.is_floating_point()]
    family = case.parent.family
    if isinstance(settings.train, tuple):
        for pattern in settings.train:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise SurgeryError(
                    f"distill.train: no tensor fits {pattern!r}; names look like {names[len(names) // 2]}"
                )
        chosen = {name for name in names if any(fnmatchcase(name, pattern) for pattern in settings.train)}
    elif settings.train == "all":
        chosen = set(names)
    else:
        layers = zip(case.spec.layers, spans(case.spec, len(case.parent_spec.layers)), strict=True)
        wanted = [
            family.layer(index)
            for index, (_, span) in enumerate(layers)
            if settings.train == "blocks" or case.changed(index, span)
        ]
        chosen = {name for name in names if name.startswith(tuple(wanted))}
    if family.encoder:
        # Pooler and heads say nothing that is trained on.
        base = dict(model.base_model.named_parameters())
        read = {id(parameter) for name, parameter in base.items() if not name.startswith("pooler.")}
        chosen &= {name for name, parameter in model.named_parameters() if id(parameter) in read}
    if settings.trees and not settings.trees.temperature:
        # Hard decisions have no gradient.
        chosen = {name for name in chosen if name.rpartition(".")[2] not in ("router_weight", "router_bias")}
    if not settings.kl and not settings.cross_entropy and not settings.pooled:
        # Nothing behind the last block is read: it would never get a gradient.
        behind = (f"{family.final_norm}.", *(() if case.spec.tied else (f"{family.head}.",)))
        chosen = {name for name in chosen if not name.startswith(behind)}
    if not chosen:
        raise SurgeryError(f"distill.train: {settings.train} names no tensor of this student")
    return chosen


def _adapt(model: Any, lora: Lora, moving: set[str], seed: int) -> None:
    """Put low-rank adapters on the linear layers whose weights were to move; only those train."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise SurgeryError("distill.lora needs peft: pip install 'llmsurgeon[peft]'") from error
    from transformers.pytorch_utils import Conv1D

    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    linear = {name for name in linear if f"{name}.weight" in moving}
    if lora.targets != "all-linear":
        linear = {name for name in linear if name.rpartition(".")[2] in lora.targets}
    if not linear:
        raise SurgeryError(f"distill.lora: none of the linear layers that train is called {', '.join(lora.targets)}")
    transposed = isinstance(model.get_submodule(min(linear)), Conv1D)
    for name in sorted(linear):
        weight: Any = model.get_submodule(name).weight
        if is_ternary(weight.T if transposed else weight):
            raise SurgeryError(
                f"distill.lora: {name} is ternary, and an adapter merged into it would not leave it so; name other "
                "targets, or train without lora"
            )
        if model.get_submodule(name)._forward_pre_hooks:
            raise SurgeryError(
                f"distill.lora: {name} reads through a norm of its own, which an adapter beside it would not; name "
                "other targets, or train without lora"
            )
    torch.manual_seed(seed)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=sorted(linear),
        fan_in_fan_out=transposed,
    )
    inject_adapter_in_model(config, model)


def merged(model: Any) -> dict[str, Tensor]:
    """The weights of every layer with an adapter, the adapter merged into them: name -> tensor."""
    from peft.tuners.lora import LoraLayer

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=True)
            found[f"{name}.weight"] = module.get_base_layer().weight.detach()  # type: ignore[operator]
    return found


class GlobalTask:
    """Rows of the corpus with what the parent says about them, and the held-out text that judges."""

    ahead = AHEAD

    def __init__(self, case: Case, settings: Distill, corpus: Corpus, targets: Targets) -> None:
        self.case, self.settings, self.corpus, self.targets = case, settings, corpus, targets
        rows = max(1, settings.evaluation_tokens // case.held_out.shape[1])
        self.judged = case.held_out[:: max(1, len(case.held_out) // rows)][:rows]
        self._parent_last: Tensor | None = None

    def prepare(self, numbers: np.ndarray) -> None:
        """Ask the parent."""
        self.targets.prepare(numbers)

    def batch(self, numbers: np.ndarray, step: int, device: torch.device) -> dict[str, Any]:
        """ids, the parent's answers, the positions that carry the KL, and a block transformer's padding."""
        tokens = self.corpus.tokens(numbers)
        answers = {name: values.to(device) for name, values in self.targets.of(numbers, tokens).items()}
        return {
            "ids": tokens.to(device),
            **answers,
            **self._positions(tokens.shape[1], step, device),
            **self._padding(step),
        }

    def _padding(self, step: int) -> dict[str, int]:
        """A block transformer's first block has another number of tokens at each step, as prompts have."""
        if self.case.spec.block_transformer is None:
            return {}
        rng = np.random.default_rng([self.settings.seed, step, 1])
        return {"padding": int(rng.integers(self.case.spec.block_transformer.block_length))}

    def _positions(self, length: int, step: int, device: torch.device) -> dict[str, Tensor]:
        """A share of the positions, other ones at each step; the same for all sequences and processes."""
        if self.settings.positions == 1 or not self.settings.kl:
            return {}
        count = max(1, round(length * self.settings.positions))
        chosen = np.random.default_rng([self.settings.seed, step]).choice(length, count, replace=False)
        return {"positions": torch.from_numpy(np.sort(chosen)).to(device)}

    def judge(self, module: nn.Module) -> dict[str, float]:
        """KL to the parent (the value), perplexity ratio, top-1 agreement, both losses on the held-out sequences."""
        parent, device = self.case.parent, next(module.parameters()).device
        if self._parent_last is None:
            self._parent_last = walk(parent, self.judged, [Variant()], batch=self.case.batch)[0]
        last = self._parent_last
        found = evaluate_hidden(
            self.judged,
            lambda row: module(self.judged[row : row + 1].to(device))["logits"],
            lambda row: parent.final(last[row].to(parent.device)),
        )
        assert found.kl is not None and found.perplexity_ratio is not None and found.top1_agreement is not None
        assert found.parent_perplexity is not None
        measures = {"kl": found.kl, "perplexity_ratio": found.perplexity_ratio, "top1": found.top1_agreement}
        losses = {"loss": math.log(found.perplexity), "parent_loss": math.log(found.parent_perplexity)}
        return {"value": found.kl, **measures, **losses}


def wanted_of(case: Case, settings: Distill) -> tuple[tuple[int, ...], Wanted]:
    """(blocks of the student that carry the hidden-state loss, what the parent must say)."""
    layers = len(case.spec.layers)
    count = min(layers, settings.hidden_layers or layers) if settings.hidden else 0
    mine = tuple(round((place + 1) * layers / count) - 1 for place in range(count))
    ends = [span[-1] for span in spans(case.spec, len(case.parent_spec.layers))]
    # An encoder's last states are kept as those are from which a decoder's whole distributions follow.
    top_k = settings.top_k if settings.kl else None if settings.pooled else 0
    return mine, Wanted(tuple(ends[index] for index in mine), top_k)


def distill_globally(case: Case, settings: Distill, began: float) -> Training:
    """Train the whole student; what moved is in the result's file, under canonical names.

    Raises:
        SurgeryError: bad settings, or a loss that diverges.
        Stopped: on SIGTERM, with the state saved.
    """
    from llmsurgeon.healing.distill.encoders import EncoderDistiller, EncoderTask

    low = case.parent.dtype in (torch.bfloat16, torch.float16)
    accelerator = engine(settings, case.device, low, case.logs)
    mine, wanted = wanted_of(case, settings)
    corpus = case.corpus(settings.seed)
    targets: Targets
    if settings.targets == "disk":
        targets = StoredTargets(corpus, lambda: case.parent, case.fingerprint, wanted, case.batch)
    else:
        targets = LiveTargets(case.parent_config, case.parent, wanted, case.parent.dtype)
    family = case.parent.family
    student = TappedModel(build_student(case, settings, torch.float32), family.layers, mine, family.encoder)
    module: nn.Module
    if family.encoder:
        module = EncoderDistiller(student, targets, settings, case.parent.padding)
        task: GlobalTask = EncoderTask(case, settings, corpus, targets)
    else:
        hardening = settings.trees.hardening if settings.trees else 0.0
        module = Distiller(student, targets, settings.hidden, settings.kl, settings.cross_entropy, hardening)
        task = GlobalTask(case, settings, corpus, targets)
    trainer = Trainer(module, task, settings, accelerator, case.folder, prefix="student.model.", began=began)
    training = trainer.run()
    if settings.lora is None or training.file is None:
        stored = {name: case.weights[name].dtype for name in case.weights}
        transposed = case.parent.family.transposed
        training = packed(training, stored.__getitem__, transposed, write=accelerator.is_main_process)
        accelerator.wait_for_everyone()
        return training
    if accelerator.is_main_process:
        _merge(case, settings, Path(training.file))
    accelerator.wait_for_everyone()
    return replace(training, file=str(case.folder / MERGED))


def _merge(case: Case, settings: Distill, adapters: Path) -> None:
    """Write the weights with the adapters merged in."""
    from safetensors.torch import load_file, save_file

    student = build_student(case, settings, torch.float32)
    student.load_state_dict(load_file(adapters), strict=False)
    tensors = {name: tensor.contiguous() for name, tensor in merged(student).items()}
    keep(case.folder / MERGED, lambda path: save_file(tensors, path))


@dataclass(frozen=True)
class Distilled:
    """What a distillation made.

    files: name of each trained tensor -> the file that holds it.
    trainings: (block, training), one for each block in local mode; (None, training) for the whole student.
    log: the losses step by step, and what was measured on held-out text.
    """

    mode: str
    files: dict[str, Path]
    trainings: tuple[tuple[int | None, Training], ...]
    log: list[dict[str, Any]]
    seconds: float

    @property
    def tokens(self) -> int:
        """Tokens trained on; in local mode the mean over blocks."""
        return sum(training.tokens for _, training in self.trainings) // len(self.trainings)

    @property
    def note(self) -> str:
        """One line for the model card."""
        what = "the whole student" if self.mode == "global" else f"{len(self.trainings)} blocks, each on its own"
        line = f"Distilled: {what}, {self.tokens:,} tokens in {_duration(self.seconds)}"
        kept = [training for _, training in self.trainings if training.file is None]
        odd = [t.stopped for _, t in self.trainings if t.stopped != "done"]
        line += f"; {len(kept)} of {len(self.trainings)} kept as it was, nothing was better" if kept else ""
        return line + (f" ({'; '.join(odd)})." if odd else ".")

    def to_dict(self) -> dict[str, Any]:
        """For surgery.json."""
        return {
            "mode": self.mode,
            "seconds": round(self.seconds, 1),
            "trainings": [{"block": block, **_report(training)} for block, training in self.trainings],
        }


def _report(training: Training) -> dict[str, Any]:
    kept = {name: value for name, value in asdict(training).items() if name not in ("file", "folder")}
    return {**kept, "tokens_per_second": round(training.tokens_per_second, 1)}


def distill(case: Case, settings: Distill, began: float | None = None) -> Distilled:
    """Heal the student with gradients, globally or block by block as the settings say.

    `began`: when the time budget began (`time.monotonic()`); now, if it is not given.

    Raises:
        SurgeryError: bad settings, no text, or a loss that diverges.
        Stopped: on SIGTERM, with everything saved in the case's folder.
    """
    from llmsurgeon.healing.distill.local import distill_locally

    began = time.monotonic() if began is None else began
    trainings: list[tuple[int | None, Training]]
    if settings.mode == "global":
        trainings = [(None, distill_globally(case, settings, began))]
    else:
        trainings = [*distill_locally(case, settings, began)]
    if settings.minutes is not None and not any(training.steps for _, training in trainings):
        raise SurgeryError(
            f"distill: not one step fitted into {settings.minutes:g} minutes, which began with reading the text and "
            "asking the parent; give more of them. What the parent said is kept for the next run"
        )
    files: dict[str, Path] = {}
    log = []
    for block, training in trainings:
        prefix = "" if block is None else case.parent.family.layer(block)
        if training.file:
            with safe_open(training.file, framework="pt") as opened:
                files |= {prefix + name: Path(training.file) for name in opened.keys()}  # noqa: SIM118
        curve = Path(training.folder) / LOG
        lines = curve.read_text().splitlines() if curve.is_file() else []
        log += [{**({} if block is None else {"block": block}), **json.loads(line)} for line in lines]
    return Distilled(settings.mode, files, tuple(trainings), log, time.monotonic() - began)


def _duration(seconds: float) -> str:
    """In minutes, from two of them on."""
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"
