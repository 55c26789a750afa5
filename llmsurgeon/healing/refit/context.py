"""What every closed-form update reads: both models over one calibration batch, and the layer that is being fitted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from llmsurgeon.healing import batches
from llmsurgeon.healing.batches import Batches, token_weights
from llmsurgeon.healing.refit.ridge import Moments
from llmsurgeon.healing.store import LayerStore
from llmsurgeon.model.families.base import Family
from llmsurgeon.model.parts import FFFSpec
from llmsurgeon.model.spec import LayerSpec, ModelSpec
from llmsurgeon.model.ternary import is_ternary
from llmsurgeon.walk.runner import LayerRunner

Student = TypeVar("Student")


@dataclass(frozen=True)
class RefitOptions:
    """ridges: candidates, as multiples of the mean diagonal of the Gram matrix; the other ridges likewise."""

    ridges: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
    align: bool = True
    align_ridge: float = 0.03
    join: bool = True
    join_ridge: float = 0.3


@dataclass(frozen=True)
class Context(Generic[Student]):
    """A student beside its parent, and the text on which it is fitted and judged.

    parent: over the parent's weights, layer by layer; parent_spec: its description.
    student: over the student's weights, layer by layer; a block transformer is the model itself, whole in memory.
    spec: the student's description; its layers name those of the parent that they stand for.
    store: keeps what is found as soon as it is found: a killed run goes on there.
    """

    parent: LayerRunner
    student: Student
    parent_spec: ModelSpec
    spec: ModelSpec
    batches: Batches
    options: RefitOptions
    store: LayerStore

    @property
    def family(self) -> Family:
        """Whose names the tensors have."""
        return self.parent.family


@dataclass(frozen=True)
class Update:
    """What became of one closed-form update of the student's layer `layer`, which stands for `parents`.

    ridge: the one that was chosen, None where no update was made. error_ratio: mean squared error on the held-out
    sequences behind it, relative to before.
    """

    layer: int
    parents: tuple[int, ...]
    projection: str
    ridge: float | None
    error_ratio: float

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> Update:
        """From what a store keeps."""
        return cls(**{**record, "parents": tuple(record["parents"])})

    @property
    def accepted(self) -> bool:
        """True where it was made."""
        return self.ridge is not None

    def to_dict(self) -> dict[str, Any]:
        """For surgery.json."""
        fields = dict(vars(self))
        return {"block": fields.pop("layer"), **fields}


def weights_in(stream: Tensor) -> Tensor:
    """What each token counts where what is missing in `stream` [S, T, D] is fitted, [S, T].

    `token_weights`, down to a power of two: then no number is rounded by it.
    """
    return token_weights(stream).log2().floor().exp2()


def weighted(features: Tensor, weights: Tensor) -> Tensor:
    """Rows [n, F] times their weights [n, 1], exact: float16 has too few small numbers and becomes float32."""
    wide = features.float() if features.dtype == torch.float16 else features
    return wide * weights.to(wide.dtype)


@dataclass
class LayerFit:
    """One loaded layer of the student while updates move its weights.

    index, spec, span: its place in the student, its description, the parent's layers whose work it does.
    module: it, holding tensors of its own.
    changed: it is not simply the parent's layer; drifted: one before it was not, so it reads something new.
    entered: the student's stream in front of it, [S, T, D].
    parent: the parent's stream, [S, T, D]: in front of the span, and once that was walked, behind it.
    read: then what the FFN of each layer of the span read, [layers of the span, S, T, D].
    summed: then, of families with norms behind the sums, what the last of these norms read, where trees need it.
    """

    context: Context[LayerRunner]
    index: int
    spec: LayerSpec
    span: tuple[int, ...]
    module: Any
    changed: bool
    drifted: bool
    entered: Tensor
    parent: Tensor
    summed: Tensor
    read: Tensor = field(default_factory=lambda: torch.empty(0))
    attended: Tensor | None = None
    updates: list[Update] = field(default_factory=list)

    @property
    def student(self) -> LayerRunner:
        """Runs the layer."""
        return self.context.student

    @property
    def family(self) -> Family:
        """Whose names the tensors have."""
        return self.context.family

    @property
    def options(self) -> RefitOptions:
        """Which updates are wanted, and their ridges."""
        return self.context.options

    @property
    def has_trees(self) -> bool:
        """True where its FFN is a fast feedforward network."""
        return isinstance(self.spec.ffn, FFFSpec)

    def behind_attention(self) -> Tensor:
        """The student's stream behind the layer's attention, [S, T, D]."""
        if self.attended is None:
            self.attended = batches.attended(self.student, self.context.batches, self.index, self.entered)
        return self.attended

    def ffn_stream(self) -> Tensor:
        """The stream that the layer's FFN reads."""
        return self.entered if self.student.parallel_residual else self.behind_attention()

    def moments(self, batch: Callable[[slice], tuple[Tensor, Tensor]], weights: Tensor | None = None) -> Moments:
        """The sums of a regression; `batch` gives the features and what is missing of some sequences.

        weights: what each token counts, [S, T], as `weights_in` has them; all alike where it is None.
        """
        text = self.context.batches
        moments = Moments(*text.counts)
        for part, held in text.parts:
            features, missing = (text.rows(part, values) for values in batch(part))
            if weights is not None:
                each = text.rows(part, weights[part]).to(missing.device)
                features, missing = weighted(features, each), missing * each
            moments.add(features, missing, held)
            del features, missing  # the widest tensors there are: not beside those of the next batch
        return moments.complete()

    def note(self, projection: str, ridge: float | None, error_ratio: float) -> None:
        """Keep for the records what became of an update."""
        self.updates.append(Update(self.index, self.spec.parents, projection, ridge, error_ratio))

    def is_ternary(self, name: str) -> bool:
        """True where the weight of a linear inside the layer is ternary, which no update may move."""
        weight = getattr(dict(self.module.named_modules()).get(name), "weight", None)
        return weight is not None and is_ternary(weight.T if self.family.transposed else weight)
