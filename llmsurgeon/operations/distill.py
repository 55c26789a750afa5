"""The recipe step of distillation, healing with gradients; the computation is in healing/distill/."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from llmsurgeon.boundary.limits import (
    LARGEST_SEED,
    LONGEST_SEQUENCE,
    MOST_MINUTES,
    MOST_PROCESSES,
    MOST_SEQUENCES,
    MOST_TOKENS,
)
from llmsurgeon.model.parts import FFFSpec, Touch
from llmsurgeon.operations.base import Plan, Step, Subject
from llmsurgeon.text.files import TextFile

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Tokens = Annotated[int, Field(ge=1, le=MOST_TOKENS)]
Sequences = Annotated[int, Field(ge=1, le=MOST_SEQUENCES)]
Share = Annotated[float, Field(ge=0, le=1)]
# The weight of a loss of its name in healing/distill/losses.py.
LOSS = "loss"
LossWeight = Annotated[float, Field(ge=0), LOSS]


# Optimizers that train by gradients alone; LBFGS, SparseAdam and Muon ask for more than a step.
TORCH_OPTIMIZERS = (
    *("Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop"),
    "SGD",
)
# Libraries whose classes a recipe may name: it may come from a stranger, and to import what it names is to run it.
OPTIMIZER_LIBRARIES = ("bitsandbytes.optim", "torchao.optim")


def check_optimizer(name: str) -> str:
    """The name of an optimizer, as it is.

    Raises:
        ValueError: none of those that a recipe may name.
    """
    library, _, kind = name.rpartition(".")
    known = library == "torch.optim" and kind in TORCH_OPTIMIZERS
    if name == "adamw" or known or (library in OPTIMIZER_LIBRARIES and kind.isidentifier() and kind[0].isupper()):
        return name
    raise ValueError(
        f"{name!r} is no optimizer that a recipe may name: adamw, torch.optim.X with X one of "
        f"{', '.join(TORCH_OPTIMIZERS)}, or a class of {' or '.join(OPTIMIZER_LIBRARIES)}"
    )


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Source(_Part):
    """Text to train on: a file, a dataset on the hub (NAME[:CONFIG][:SPLIT]), or so many tokens that the parent writes.

    `calibration: true` stands for what is trained on where no source is named: the text that calibration reads, whole.
    At most `tokens` tokens of it are taken, and drawn as often as `weight` says beside the other sources'.
    """

    text: TextFile | None = None
    dataset: str | None = None
    sampled: Tokens | None = None
    calibration: Literal[True] | None = None
    weight: Positive = 1.0
    tokens: Tokens = 10_000_000

    @model_validator(mode="after")
    def _one(self) -> Source:
        kinds = ("text", "dataset", "sampled", "calibration")
        given = [name for name in kinds if getattr(self, name) is not None]
        if len(given) != 1:
            found = ", ".join(given) or "none"
            raise ValueError(f"takes exactly one of text, dataset, sampled and calibration, got {found}")
        return self


class Lora(_Part):
    """Low-rank updates in place of the weights themselves (arXiv 2106.09685), merged in the end."""

    rank: Count = 16
    alpha: Positive = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"


class Trees(_Part):
    """How fast feedforward networks train, whose decisions are then sigmoids (arXiv 2308.14711, section 3).

    hardening: weight of the decisions' entropy; temperature: of the sigmoids, towards 0 they become the hard decisions
    that inference takes. At 0 they are: paths alone are computed and learn, hyperplanes stay. region_leak: share of
    decisions that are swapped.
    """

    hardening: Annotated[float, Field(ge=0)] = 0.0
    temperature: Annotated[float, Field(ge=0)] = 1.0
    region_leak: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _soft(self) -> Trees:
        if not self.temperature and (self.hardening or self.region_leak):
            raise ValueError("trees: at temperature 0 decisions are hard: leave out hardening and region_leak")
        return self


class Distill(Step):
    """Train the student towards the parent's hidden states and next-token distributions.

    An encoder predicts no next token: it is trained towards hidden states and their mean over each sequence, `pooled`.

    mode: `global` trains the whole student at once; `local` each changed layer on its own, on the parent's activations.
    data: by default the recipe's calibration text, whole.
    sequence_length: tokens in a row; left out: 256, or the model's positions where they are fewer.
    steps, tokens, minutes: how long; whichever ends first.
    train: `all`, `blocks` (not embedding, final norm and head), `changed` layers, or patterns of tensor names.
    hidden, hidden_layers, kl, top_k, positions: the losses' weights; how many layer ends carry the first, evenly
        spaced, last included; how many of the parent's tokens and which share of positions carry the second.
    ternary_warmup: ternary linears and BitLinears train by latent weights W, and the model sees W + lambda (W' - W),
        W' ternary: the share of the run over which lambda grows from 0 to 1; 0: it is 1 from the start.
    cross_entropy: the weight of the loss on the text's own next tokens, which asks no parent.
    pooled: encoders only, the weight of 1 - cos of the sequences' mean last hidden states. Their defaults are pooled 1,
        kl 0 and targets `memory`.
    trees: how fast feedforward networks train.
    targets: `disk` computes what the parent says once, layer by layer, and keeps it; `memory` runs the parent beside.
    """

    op: Literal["distill"] = "distill"
    touches: ClassVar[frozenset[Touch]] = frozenset({Touch.TRAINS})
    heals: ClassVar[bool] = True
    trains: ClassVar[bool] = True
    alone: ClassVar[str] = (
        "does not train inside a run of several processes: cut and refit first, then `accelerate launch -m llmsurgeon "
        "heal OUT --parent MODEL`"
    )
    libraries: ClassVar[tuple[str, ...]] = ("accelerate", "peft")
    tower_refusal: ClassVar[str] = (
        "distill saves the text tower alone, without the rest of this vision-language model ({kind}); heal it with "
        "refit"
    )
    mode: Literal["global", "local"] = "global"
    data: tuple[Source, ...] | None = None
    sequence_length: Annotated[int, Field(ge=2, le=LONGEST_SEQUENCE)] = 256
    batch: Sequences = 8
    accumulate: Sequences = 1
    steps: Count | None = None
    tokens: Count | None = None
    minutes: Annotated[float, Field(gt=0, le=MOST_MINUTES)] | None = None
    train: Literal["all", "blocks", "changed"] | tuple[str, ...] = "all"
    lora: Lora | None = None
    ternary_warmup: Share = 0.5
    hidden: LossWeight = 1.0
    hidden_layers: Count | None = None
    kl: LossWeight = 1.0
    cross_entropy: LossWeight = 0.0
    pooled: LossWeight = 0.0
    top_k: Count | None = None
    positions: Annotated[float, Field(gt=0, le=1)] = 1.0
    trees: Trees | None = None
    targets: Literal["disk", "memory"] = "disk"
    optimizer: Annotated[str, AfterValidator(check_optimizer)] = "adamw"
    learning_rate: Positive = 1e-4
    final_learning_rate: Share = 0.1
    warmup: Annotated[int, Field(ge=0)] = 20
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Share, Share] = (0.9, 0.95)
    clip: Positive | None = 1.0
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    gradient_checkpointing: bool = False
    processes: Annotated[int, Field(ge=1, le=MOST_PROCESSES)] = 1
    evaluations: Annotated[int, Field(ge=0)] = 5
    evaluation_tokens: Tokens = 8192
    patience: Count | None = None
    save_minutes: Positive | None = 10.0
    save_steps: Count | None = None
    trackers: tuple[str, ...] = ()
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)] = 0

    @model_validator(mode="after")
    def _consistent(self) -> Distill:
        if self.mode == "global" and not any(getattr(self, name) for name in self.losses()):
            raise ValueError("hidden and kl are both 0: there is nothing to learn from (cross_entropy is 0, too)")
        if self.mode == "local" and self.cross_entropy:
            raise ValueError("cross_entropy is of next tokens, which single blocks of local mode do not predict")
        if self.mode == "local" and self.lora is not None:
            raise ValueError("local mode trains whole blocks; lora belongs to global mode")
        if self.mode == "global" and self.processes > 1:
            raise ValueError("processes is for local mode; for global mode use `accelerate launch -m llmsurgeon heal`")
        if self.batch * self.accumulate > MOST_SEQUENCES:
            raise ValueError(
                f"batch ({self.batch:,}) times accumulate ({self.accumulate:,}) are {self.batch * self.accumulate:,} "
                f"sequences a step, expected at most {MOST_SEQUENCES:,}"
            )
        if self.data is not None and not self.data:
            raise ValueError("data is empty; leave it out to train on the calibration text")
        return self

    @classmethod
    def losses(cls) -> tuple[str, ...]:
        """Names of the fields that weigh a loss."""
        return tuple(name for name, field in cls.model_fields.items() if LOSS in field.metadata)

    @property
    def sources(self) -> tuple[Source, ...]:
        """What is trained on."""
        return self.data or (Source(calibration=True),)

    @property
    def limits(self) -> tuple[int | None, int | None, float | None]:
        """(steps, tokens, minutes); 30 minutes where the recipe names none."""
        if self.steps is None and self.tokens is None and self.minutes is None:
            return None, None, 30.0
        return self.steps, self.tokens, self.minutes

    def minutes_given(self) -> float | None:
        return self.limits[2]

    def reads(self) -> tuple[str | None, ...]:
        return tuple(name for source in self.sources for name in (source.text, source.dataset))

    def job(self) -> Distill:
        kept = ("steps", "tokens", "minutes", "evaluations", "patience", "save_minutes", "save_steps", "trackers")
        return self.model_copy(update={name: type(self).model_fields[name].default for name in kept})

    def resolve(self, subject: Subject) -> Distill:
        defaults: dict[str, Any] = {}
        if (limit := subject.spec.max_positions) and limit < self.sequence_length:
            defaults["sequence_length"] = limit
        if subject.family.encoder:
            defaults |= {"kl": 0.0, "pooled": 1.0, "targets": "memory"}
        return self.model_copy(update={k: v for k, v in defaults.items() if k not in self.model_fields_set})

    def plan(self, subject: Subject) -> Plan:
        subject.check(self)
        if subject.family.encoder:
            self._check_encoder(subject)
        elif self.pooled:
            raise subject.refuse(
                "distill: pooled is for encoders, whose sequences are embedded as a mean; leave it out"
            )
        if self.trees and not any(isinstance(layer.ffn, FFFSpec) for layer in subject.spec.layers):
            raise subject.refuse("distill: trees is for fast feedforward networks, and no layer has one; leave it out")
        if block_transformer := subject.spec.block_transformer:
            self._check_block_transformer(subject, block_transformer.block_length)
        return Plan(subject.spec, ())

    def _check_encoder(self, subject: Subject) -> None:
        """Raise SurgeryError for what an encoder cannot be trained with."""
        if self.kl or self.cross_entropy:
            raise subject.refuse(
                "distill: kl and cross_entropy are of the next token, which an encoder does not predict; leave them "
                "out, or set them to 0 (it learns from hidden and pooled)"
            )
        if self.top_k is not None or self.positions < 1:
            raise subject.refuse("distill: top_k and positions are of the KL, which an encoder does not learn from")
        if not self.hidden and not self.pooled:
            raise subject.refuse("distill: hidden and pooled are both 0: there is nothing to learn from")
        if self.mode == "local":
            raise subject.refuse("distill: mode local is for decoders; leave it out")
        if any(source.sampled is not None for source in self.sources):
            raise subject.refuse("distill: an encoder cannot sample text from itself; name a text or a dataset")

    def _check_block_transformer(self, subject: Subject, block_length: int) -> None:
        """Raise SurgeryError for what a block transformer cannot be trained with."""
        if self.mode == "local":
            raise subject.refuse("distill: mode local trains single layers on the parent's inputs, which blocks lack")
        if self.hidden:
            raise subject.refuse(
                "distill: a block transformer has no hidden states that correspond to the parent's; set hidden: 0 "
                "(and cross_entropy: 1)"
            )
        if self.train == "changed":
            raise subject.refuse("distill: train changed names no layer of a block transformer: all of them work anew")
        if self.positions < 1:
            raise subject.refuse("distill: positions is not for block transformers, which learn from all but the first")
        if self.sequence_length < 2 * block_length:
            raise subject.refuse(
                f"distill: sequence_length {self.sequence_length} does not hold a block of {block_length} tokens to "
                f"read and one to predict; give at least {2 * block_length}"
            )
