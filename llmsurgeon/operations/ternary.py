"""Ternary linears: weights become -1, 0, 1 times a scale of the tensor, of each row, or of each group of a row.

`round` needs no text and is an edit like any other: it streams. `compensated` chooses codes by what each layer reads,
the ternary layers before it included, on a walk over calibration text; that is healing/ternary/. Which linears: all
of the layers' or a part of them, or those that cost least (`share`, `max_bytes`), by a score of analysis/ternary.py.
Sources: BitNet b1.58 (arXiv 2402.17764), ternary weight networks (arXiv 1605.04711), GPTQ (arXiv 2210.17323).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from llmsurgeon.checkpoint.transform import WeightTransform
from llmsurgeon.errors import SurgeryError
from llmsurgeon.model.layers import LayerList
from llmsurgeon.model.parts import Touch
from llmsurgeon.model.spec import ModelSpec
from llmsurgeon.model.ternary import Grid, Rule, is_ternary, rounded
from llmsurgeon.operations import sub_norms
from llmsurgeon.operations.base import HELD_OUT, Computed, NewLayer, Plan, Request, Step, Subject, all_kept, assemble
from llmsurgeon.operations.fit_memory import Text, ternary_bytes
from llmsurgeon.operations.ternary_linears import cheapest, linears_of_modules, linears_of_parts

SCORE, BYTES = "ternary", "ternary_bytes"
Share = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True)
class Linears(Request):
    """Layer -> names inside it of the weights that may become ternary, and on which grid."""

    linears: Mapping[int, Sequence[str]]
    grid: Grid


class Ternary(Step):
    """Make linears ternary.

    linears: whose: the FFNs', the attentions', or all of the layers'.
    layers: of which layers; all by default.
    modules: or a list of layers for each linear, by its path inside a layer (mlp.down_proj: [0-5]).
    share, max_bytes: of these, those whose rounding changes their layers' output least, until this share of their
        numbers is ternary, or the model (ternary weights packed, 2 bits each) is no larger than this.
    method: compensated (codes make up for each other's errors on calibration text) or round.
    scale: the rule for codes and scale; granularity: what has one: the tensor, a row, or group_size numbers of it.
    embeddings, head: these, too, by rounding.
    sub_norm: an RMSNorm before each output projection of attention and FFN that becomes ternary (SubLN), whose gain is
        the usual size (geometric mean of RMS) of what the projection read; compensated then fits projection and gain.
        For a model that is trained afterwards: a norm there changes what the model computes.
    align: with compensated, first move each linear of changed and later layers to give what it gave before, be it
        made ternary or not; ridge: as multiples of mean(diag(X^T X)), the best on held-out tokens is taken.
    """

    op: Literal["ternary"] = "ternary"
    touches: ClassVar[frozenset[Touch]] = frozenset({Touch.REWRITES_LINEARS})
    linears: Literal["ffn", "attention", "all"] = "all"
    layers: LayerList | None = None
    modules: dict[str, LayerList] | None = None
    share: Share | None = None
    max_bytes: Annotated[int, Field(ge=1)] | None = None
    method: Literal["compensated", "round"] = "compensated"
    scale: Rule = "least_squares"
    granularity: Literal["tensor", "row", "group"] = "tensor"
    group_size: Annotated[int, Field(ge=32, multiple_of=32)] | None = None
    embeddings: bool = False
    head: bool = False
    sub_norm: bool = False
    align: bool = True
    ridge: tuple[Annotated[float, Field(gt=0)], ...] = (0.03, 0.1, 0.3, 1.0)
    held_out: Annotated[float, Field(gt=0, lt=1)] = HELD_OUT

    @model_validator(mode="after")
    def _consistent(self) -> Ternary:
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError("ternary: granularity group goes with group_size, the others without")
        if self.share is not None and self.max_bytes is not None:
            raise ValueError("ternary takes share or max_bytes, not both")
        if self.modules is not None and (self.layers or self.share or self.max_bytes or self.linears != "all"):
            raise ValueError("ternary: modules name their layers; leave out linears, layers, share and max_bytes")
        return self

    @property
    def heals(self) -> bool:  # type: ignore[override]
        """Codes that compensate are found as a refit is: on a walk, after all cuts."""
        return self.method == "compensated"

    @property
    def grid(self) -> Grid:
        """What shares a scale, and by which rule it is chosen."""
        return Grid(self.scale, self.granularity, self.group_size)

    def withholds(self) -> float | None:
        return self.held_out if self.heals else None

    def needs(self) -> frozenset[str]:
        return frozenset(({SCORE} if self._budget else set()) | ({sub_norms.SIZES} if self.sub_norm else set()))

    @property
    def _budget(self) -> bool:
        return bool(self.share or self.max_bytes)

    def requests(self, subject: Subject) -> list[Request]:
        linears = [Linears(SCORE, self.chosen(subject), self.grid)] if self._budget else []
        return [*linears, *([sub_norms.Norms(sub_norms.SIZES, self.normed(subject))] if self.sub_norm else [])]

    def foresee(self, subject: Subject) -> Mapping[str, Any]:
        """Of norms that are to be, all but the size of their gains."""
        if not self.sub_norm:
            return {}
        writers = (*subject.family.sub_norms,)
        whole = [layer for layer in subject.spec.layers if not layer.branches]
        return {sub_norms.SIZES: {layer.parents[0]: dict.fromkeys(writers, 1.0) for layer in whole}}

    def normed(self, subject: Subject) -> dict[int, tuple[str, ...]]:
        """Layer -> output projections inside it that get a norm."""
        return sub_norms.places(subject, self.chosen(subject)) if self.sub_norm else {}

    def chosen(self, subject: Subject) -> dict[int, tuple[str, ...]]:
        """Layer -> names inside it of the weights that become ternary; a budget has not been drawn from yet.

        Raises:
            SurgeryError: a layer has no such linears.
        """
        subject.check(self)
        if subject.spec.tied and (self.head or self.embeddings):
            raise subject.refuse(
                "ternary: head and embedding are one tied tensor, and a ternary head costs more than all blocks; leave "
                "out embeddings and head"
            )
        if self.modules is not None:
            return linears_of_modules(subject, self.modules)
        return linears_of_parts(subject, self.linears, self.layers)

    def check_follower(self, step: Step) -> None:
        if isinstance(step, Ternary):
            if self.sub_norm or step.sub_norm:
                raise SurgeryError(
                    "ternary: a step with sub_norm is the only ternary step of a recipe; run two recipes"
                )
        elif not step.heals:
            raise SurgeryError(f"step {step.op} comes after ternary: what it joins or folds would not stay ternary")

    def check_weights(self, subject: Subject, weights: Mapping[str, Tensor]) -> None:
        """A linear that is to become ternary must not be so already, and must have whole groups."""
        for index, names in self.chosen(subject).items():
            for name in names:
                full = subject.family.layer(index) + name
                weight = weights[full]
                self.grid.group(weight.shape[0 if subject.family.transposed else 1])
                refuse_ternary(full, weight, subject.family.transposed)

    def made_ternary(self, student: Subject) -> dict[str, str]:
        head = [f"{student.family.head}.weight"] if self.head else []
        return dict.fromkeys([*self._names(student), *head], self.granularity)

    def fit_bytes(self, parent: ModelSpec, student: Subject, shapes: Mapping[str, tuple[int, ...]], text: Text) -> int:
        linears = [shapes[name] for name in self._names(student) if name in shapes]
        turned = [shape[::-1] if student.family.transposed else shape for shape in linears]
        hidden = student.spec.hidden
        return max((ternary_bytes(inputs, outputs, text, hidden) for outputs, inputs in turned), default=0)

    def _names(self, subject: Subject) -> list[str]:
        """Full names of the layers' weights that become ternary."""
        layers = self.chosen(subject).items()
        return [subject.family.layer(index) + name for index, inside in layers for name in inside]

    def resolve(self, subject: Subject) -> Step:
        if not self._budget:
            return self
        costs, everything = subject.score(SCORE, "ternary"), subject.score(BYTES, "ternary")
        budget = (self.share, self.max_bytes)
        modules, left = cheapest(subject, self.chosen(subject), costs, everything, *budget)
        if self.max_bytes is not None and left > self.max_bytes:
            raise subject.refuse(
                f"ternary: max_bytes {self.max_bytes:,} is out of reach: with all of {self.linears} ternary "
                f"{left:,} bytes are left, of {everything:,}"
            )
        if not modules:
            raise subject.refuse(f"ternary: the model has {everything:,} bytes already; nothing would become ternary")
        update = {"share": None, "max_bytes": None, "layers": None, "linears": "all", "modules": modules}
        return self.model_copy(update=update)

    def plan(self, subject: Subject) -> Plan:
        chosen, family = self.chosen(subject), subject.family
        edit = edited(self.grid, family.transposed)
        layers = all_kept(subject)
        if self.method == "round":
            for index, names in chosen.items():
                tensors: dict[str, str | Computed] = dict(layers[index].tensors)
                for name in names:
                    source = str(layers[index].tensors[name])
                    tensors[name] = Computed((source,), partial(edit, source))
                layers[index] = NewLayer(layers[index].spec, tensors)
        normed = self.normed(subject)
        for index, paths in normed.items():
            layers[index] = sub_norms.with_norms(subject, layers[index], paths)
        plan = assemble(subject, layers, [self._note(chosen, sum(map(len, normed.values())))])
        outside = [(f"{family.embedding}.weight", self.embeddings), (f"{family.head}.weight", self.head)]
        plain = edited(self.grid, transposed=False)
        transforms = []
        for name, wanted in outside:
            if wanted and name not in subject.names:
                raise subject.refuse(f"ternary: this model has no {name}")
            if wanted:
                transforms.append(WeightTransform((name,), (name,), partial(plain, name)))
        return Plan(plan.spec, (*plan.transforms, *transforms), plan.notes)

    def _note(self, chosen: Mapping[int, tuple[str, ...]], norms: int) -> str:
        per = {"tensor": "tensor", "row": "row", "group": f"{self.group_size} numbers of a row"}[self.granularity]
        count = sum(len(names) for names in chosen.values())
        how = (
            "codes compensate each other"
            if self.method == "compensated"
            else "by rounding, which training is to make up for"
        )
        more = [name for name, wanted in (("embedding", self.embeddings), ("head", self.head)) if wanted]
        also = f" and {' and '.join(more)}" if more else ""
        said = f"Ternary: {count} linears of {len(chosen)} blocks{also}, a scale for each {per} ({self.scale}), {how}."
        return said + (f" An RMSNorm stands before {norms} of them, which the parent does not have." if norms else "")


def edited(grid: Grid, transposed: bool) -> Callable[[str, Tensor], Tensor]:
    """The edit that rounds one weight, whose name it takes first; a `transposed` weight is [I, O]."""

    def edit(name: str, weight: Tensor) -> Tensor:
        refuse_ternary(name, weight, transposed)
        made = rounded(weight.T if transposed else weight, grid)
        return made.T.contiguous() if transposed else made

    return edit


def refuse_ternary(name: str, weight: Tensor, transposed: bool = False) -> None:
    """Raise SurgeryError for a weight that is ternary already."""
    if is_ternary(weight.T if transposed else weight):
        raise SurgeryError(
            f"ternary: {name} is ternary already, and each further rounding shrinks its scale; start from the weights "
            "before, or name other layers"
        )
