"""Fewer attention heads: whole key/value groups with their queries, or as many query heads of each group.

`score: least_squares` removes them one after the other, each time the one that the others can best stand in for
(optimal brain surgeon on structures: ZipLM, arXiv 2302.04089; OSSCAR, arXiv 2403.12983); a refit then moves the others'
columns of the output projection. `magnitude` is the product of the norms of a head's values and of its columns, which
needs no text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from llmsurgeon.model.families import Family
from llmsurgeon.model.layers import LayerList
from llmsurgeon.model.parts import AttentionSpec, Touch
from llmsurgeon.operations.base import (
    Computed,
    NewLayer,
    Offer,
    Plan,
    Request,
    Step,
    Subject,
    all_kept,
    assemble,
    exactly_one,
    shares_of,
    sorted_along,
)
from llmsurgeon.operations.prune_width import parents_scores, top_channels, widths_by_loss
from llmsurgeon.operations.ranked import with_part

Unit = Literal["group", "head"]
# The shares of its query heads that a search may leave an attention.
SHARES = (0.75, 0.5, 0.25)
# Of tensors (values, output projection), or of none: the units that stay, ascending.
Choice = Callable[..., Tensor]


@dataclass(frozen=True)
class Heads(Request):
    """The heads, or key/value groups, of these attentions: (parent layer, columns of one in the output projection)."""

    unit: Unit
    sizes: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Units:
    """What an attention is cut in: `count` units of `heads` query heads each.

    groups: so many sets of neighbouring units lose as many each.
    whole: keys and values go along.
    """

    count: int
    heads: int
    groups: int
    whole: bool

    @classmethod
    def of(cls, attention: AttentionSpec, unit: Unit) -> Units:
        """Key/value groups, or query heads, which are the same where each has keys and values of its own."""
        shared = attention.heads // attention.kv_heads
        if unit == "group" or shared == 1:
            return cls(attention.kv_heads, shared, 1, True)
        return cls(attention.heads, 1, attention.kv_heads, False)


class PruneHeads(Step):
    """Keep `heads` query heads of each attention, or the share `keep` of them.

    unit: `group` takes key/value heads away with all queries that share them, which makes the cache smaller, too;
        `head` takes as many query heads from each group.
    spread: `even` keeps that share of each attention; `loss` of all together, more where they cost more (layers then
        differ). `counts` are the query heads of `layers`, one number each, as `loss` chose them.
    """

    op: Literal["prune_heads"] = "prune_heads"
    touches: ClassVar[frozenset[Touch]] = frozenset({Touch.REWRITES_HEADS})
    heads: Annotated[int, Field(ge=1)] | None = None
    keep: Annotated[float, Field(gt=0, le=1)] | None = None
    counts: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    layers: LayerList | None = None
    unit: Unit = "group"
    score: Literal["least_squares", "magnitude"] = "least_squares"
    spread: Literal["even", "loss"] = "even"

    @model_validator(mode="before")
    @classmethod
    def _in_order(cls, fields: Any) -> Any:
        return sorted_along(fields, "counts")

    @model_validator(mode="after")
    def _one_of(self) -> PruneHeads:
        exactly_one("prune_heads", heads=self.heads, keep=self.keep, counts=self.counts)
        if self.counts is not None and len(self.counts) != len(self.layers or ()):
            raise ValueError("prune_heads: counts are one for each of layers")
        if self.spread == "loss" and (self.keep is None or self.score != "least_squares" or self.unit != "group"):
            raise ValueError("prune_heads: spread: loss goes with keep, unit: group and score: least_squares")
        return self

    @staticmethod
    def misfit(family: Family) -> str | None:
        if not family.own_head_dim:
            return "its classes hold as many heads as fill the model's width, so none can go"
        return None

    def needs(self) -> frozenset[str]:
        if self.score == "magnitude":
            return frozenset()
        return frozenset({self._order, f"{self._order}_loss"})

    @property
    def _order(self) -> str:
        return f"{self.unit}_elimination"

    def requests(self, subject: Subject) -> tuple[Request, ...]:
        if self.score == "magnitude":
            return ()
        sizes = []
        for index in self.affected(subject):
            layer = subject.spec.layers[index]
            if layer.attention is not None:
                size = Units.of(layer.attention, self.unit).heads * layer.attention.head_dim
                sizes += [(parent, size) for parent in layer.parents]
        return (Heads(self._order, self.unit, tuple(sizes)),)

    def foresee(self, subject: Subject) -> Mapping[str, Any]:
        """Heads all alike: which of them stay changes no shape. For `spread: loss` all layers are alike, too."""
        if self.score == "magnitude":
            return {}
        counts = {
            layer.parents[0]: Units.of(layer.attention, self.unit).count
            for layer in subject.spec.layers
            if layer.attention is not None
        }
        curves = {layer: torch.linspace(1, 0, count + 1).square() for layer, count in counts.items()}
        return {
            self._order: {layer: torch.zeros(count) for layer, count in counts.items()},
            f"{self._order}_loss": curves,
        }

    def affected(self, subject: Subject) -> list[int]:
        """Positions of the layers whose attentions are cut.

        Raises:
            SurgeryError: a layer does not exist.
        """
        return subject.positions(self.layers, "attention", self.op)

    @classmethod
    def offers(cls, subject: Subject, grain: int) -> list[Offer]:
        offers = []
        for number in with_part(subject, "attention"):
            attention = subject.spec.layers[subject.position(number)].attention
            if not isinstance(attention, AttentionSpec) or not attention.looks_back:
                continue
            shared = attention.heads > attention.kv_heads
            for unit in ("group", "head") if shared else ("group",):
                units = Units.of(attention, unit)
                for heads in shares_of(attention.heads, SHARES, units.heads * units.groups):
                    kv = f" in {attention.kv_heads} KV groups" if unit == "head" else ""
                    step = cls(layers=(number,), counts=(heads,), unit=unit)
                    offers.append(Offer((number,), "attention", f"{heads} heads{kv}", (step,)))
        return offers

    @classmethod
    def merged(cls, steps: Sequence[Self]) -> list[Step]:
        units: dict[Unit, list[Self]] = {}
        for step in steps:
            units.setdefault(step.unit, []).append(step)
        return [
            cls(
                layers=tuple(layer for step in alike for layer in step.layers or ()),
                counts=tuple(count for step in alike for count in step.counts or ()),
                unit=unit,
            )
            for unit, alike in units.items()
        ]

    def resolve(self, subject: Subject) -> PruneHeads:
        if self.spread != "loss":
            return self
        losses = subject.score(f"{self._order}_loss", "prune_heads")
        layers = [subject.spec.layers[index] for index in self.affected(subject)]
        units, mine = {}, {}
        for layer in layers:
            number = layer.parents[0]
            if layer.attention is None:
                raise subject.refuse(f"prune_heads: layer {number} has no attention")
            if len(layer.parents) > 1:
                raise subject.refuse("prune_heads: cut heads before fusing, scores exist for the parent's layers only")
            units[number] = Units.of(layer.attention, self.unit)
            mine[number] = parents_scores(losses[number], units[number].count + 1, "prune_heads", number, subject)
        groups = widths_by_loss(mine, self.keep or 1, 1)
        counts = tuple(count * units[number].heads for number, count in groups.items())
        return PruneHeads(layers=tuple(groups), counts=counts, unit=self.unit)

    def plan(self, subject: Subject) -> Plan:
        subject.check(self)
        layers = all_kept(subject)
        counts = dict(zip(self.layers or (), self.counts or (), strict=False))
        for index in self.affected(subject):
            layers[index] = self._fewer(subject, layers[index], counts)
        return assemble(subject, layers)

    def _fewer(self, subject: Subject, layer: NewLayer, counts: Mapping[int, int]) -> NewLayer:
        family, attention, number = subject.family, layer.spec.attention, layer.spec.parents[0]
        if attention is None:
            raise subject.refuse(f"prune_heads: layer {number} has no attention")
        units = Units.of(attention, self.unit)
        stay = self._count(subject, attention, units, number, counts)
        if stay == units.count:
            return layer
        names = {suffix: str(name) for suffix, name in layer.tensors.items()}
        out = f"{family.attention}.{family.attention_out}.weight"
        values = f"{family.attention}.{family.kv[1]}.weight"
        sources: tuple[str, ...] = ()
        if self.score == "magnitude":
            sources, choose = (names[values], names[out]), _by_magnitude(attention, units, stay)
        else:
            if len(layer.spec.parents) > 1:
                raise subject.refuse("prune_heads: cut heads before fusing, scores exist for the parent's layers only")
            scores = subject.score(self._order, "prune_heads")[number]
            scores = parents_scores(scores, units.count, "prune_heads", number, subject)
            choose = _constant(best_units(scores, units, stay))
        tensors: dict[str, str | Computed] = dict(layer.tensors)
        for suffix, pick in _edits(family, attention, units).items():
            if suffix in names:
                tensors[suffix] = Computed((names[suffix], *sources), _picked(pick, choose))
        kv_heads = stay if units.whole else attention.kv_heads
        made = replace(attention, heads=stay * units.heads, kv_heads=kv_heads)
        return NewLayer(replace(layer.spec, attention=made), tensors)

    def _count(
        self, subject: Subject, attention: AttentionSpec, units: Units, number: int, counts: Mapping[int, int]
    ) -> int:
        """How many units stay."""
        step = units.heads * units.groups
        wanted = self.heads or counts.get(number)
        if wanted is None:
            return max(step, round(attention.heads * (self.keep or 1) / step) * step) // units.heads
        if wanted > attention.heads:
            raise subject.refuse(f"prune_heads: layer {number} has {attention.heads} heads, {wanted} asked for")
        if wanted % step:
            raise subject.refuse(
                f"prune_heads: layer {number} has {attention.heads} query heads in {attention.kv_heads} key/value "
                f"groups; unit {self.unit} leaves a multiple of {step}, {wanted} asked for"
            )
        return wanted // units.heads


def best_units(scores: Tensor, units: Units, stay: int) -> Tensor:
    """The units [stay] of the highest scores, ascending; as many of each key/value group where these stay."""
    each = [top_channels(part, stay // units.groups) for part in scores.view(units.groups, -1)]
    return torch.cat([chosen + place * (units.count // units.groups) for place, chosen in enumerate(each)])


def _edits(family: Family, attention: AttentionSpec, units: Units) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Name inside the layer -> (tensor, units that stay) -> what stays of it."""
    inside, width = family.attention, attention.head_dim
    readers = {family.queries: units.heads * width, **(dict.fromkeys(family.kv, width) if units.whole else {})}
    edits = {
        f"{inside}.{module}.{kind}": _selecting(0, size)
        for module, size in readers.items()
        for kind in ("weight", "bias")
    }
    return {**edits, f"{inside}.{family.attention_out}.weight": _selecting(1, units.heads * width)}


def _selecting(dim: int, size: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda tensor, kept: tensor.index_select(dim, spans(kept, size).to(tensor.device))


def spans(kept: Tensor, size: int) -> Tensor:
    """Indices of all members of groups [k] of `size` neighbours, [k * size]."""
    return (kept[:, None] * size + torch.arange(size)).flatten()


def _picked(pick: Callable[[Tensor, Tensor], Tensor], choose: Choice) -> Callable[..., Tensor]:
    return lambda tensor, *scored: pick(tensor, choose(*scored))


def _constant(indices: Tensor) -> Choice:
    return lambda: indices


def _by_magnitude(attention: AttentionSpec, units: Units, stay: int) -> Choice:
    def choose(values: Tensor, out: Tensor) -> Tensor:
        if values.is_meta:
            return best_units(torch.zeros(units.count), units, stay)
        return best_units(unit_magnitudes(values, out, attention.kv_heads, units), units, stay)

    return choose


def unit_magnitudes(values: Tensor, out: Tensor, kv_heads: int, units: Units) -> Tensor:
    """Norm of a unit's values times that of its columns of the output projection, float32 [units].

    Args:
        values: [kv_heads * head_dim, D]; out: [D, heads * head_dim].
    """
    by_head = values.float().view(kv_heads, -1).norm(dim=1)
    columns = out.float().T.reshape(units.count, -1).norm(dim=1)
    return columns * by_head.repeat_interleave(units.count // kv_heads)
