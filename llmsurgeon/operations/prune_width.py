"""Narrower FFNs: keep the inner channels that matter most.

`score: least_squares` removes channels one after the other, each time those that the others can best stand in for
(optimal brain surgeon on structures: ZipLM, arXiv 2302.04089; OSSCAR, arXiv 2403.12983); a refit then moves the others'
output columns. `activation` is mean |activation| * ||column of the down projection|| (Minitron, arXiv 2407.14679,
section 2.2), `magnitude` the product of a channel's weight norms, which needs no text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from llmsurgeon.model.layers import LayerList
from llmsurgeon.model.parts import FFNSpec, Touch
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
from llmsurgeon.operations.ranked import with_part


def channel_magnitudes(in_weights: tuple[Tensor, ...], out_weight: Tensor) -> Tensor:
    """Product of each inner channel's weight norms, float32 [H].

    Args:
        in_weights: gate and up (or up alone), each [H, D].
        out_weight: down, [D, H].
    """
    magnitudes = out_weight.float().norm(dim=0)
    for weight in in_weights:
        magnitudes = magnitudes * weight.float().norm(dim=1)
    return magnitudes


def top_channels(scores: Tensor, width: int) -> Tensor:
    """Indices [width] of the highest scores [H], ascending; ties go to the lower index."""
    return scores.sort(descending=True, stable=True).indices[:width].sort().values


def parents_scores(scores: Any, count: int, step: str, number: int, subject: Subject) -> Tensor:
    """The scores [count] of what a layer has, measured in the parent.

    Raises:
        SurgeryError: the layer has something else than in the parent, since a step before cut it.
    """
    found = torch.as_tensor(scores)
    if len(found) != count:
        raise subject.refuse(
            f"{step}: layer {number} was cut by a step before, and scores exist for what the parent has only; "
            "cut it once, or choose by score: magnitude"
        )
    return found


# The scores that each way of choosing needs, the one that ranks channels first.
SCORES = {
    "least_squares": ("ffn_elimination", "ffn_elimination_loss"),
    "activation": ("ffn_channel",),
    "magnitude": (),
}


# The shares of its channels that a search may leave an FFN.
SHARES = (0.875, 0.75, 0.625, 0.5, 0.25)


def widths_by_loss(losses: Mapping[int, Tensor], keep: float, multiple_of: int) -> dict[int, int]:
    """Layer -> width, together the share `keep` of all channels: what goes costs least where it goes.

    Args:
        losses: by layer what is lost if so many channels stay, [H + 1].
    """
    widths = {layer: len(loss) - 1 for layer, loss in losses.items()}
    left = sum(widths.values())
    goal = round(left * keep)
    while left > goal:
        # The first cut also brings a width that is no multiple down to one.
        cuts = {i: width % multiple_of or multiple_of for i, width in widths.items() if width > multiple_of}
        if not cuts:
            break

        def price(i: int, cuts: dict[int, int] = cuts) -> tuple[float, int, int]:
            more = losses[i][widths[i] - cuts[i]] - losses[i][widths[i]]
            return float(more) / cuts[i], -widths[i], i

        layer = min(cuts, key=price)
        widths[layer] -= cuts[layer]
        left -= cuts[layer]
    return widths


@dataclass(frozen=True)
class Channels(Request):
    """The channels of these parent layers' FFNs."""

    layers: frozenset[int]


class PruneWidth(Step):
    """Cut FFNs to `width` channels, or to the fraction `keep` rounded to `multiple_of`.

    spread: `even` keeps that fraction of each FFN; `loss` of all together, more where they cost more (layers then
        differ). `widths` are the widths of `layers`, one each, as `loss` chose them.
    """

    op: Literal["prune_width"] = "prune_width"
    touches: ClassVar[frozenset[Touch]] = frozenset({Touch.REWRITES_NEURONS})
    width: Annotated[int, Field(ge=1)] | None = None
    keep: Annotated[float, Field(gt=0, le=1)] | None = None
    widths: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    layers: LayerList | None = None
    score: Literal["least_squares", "activation", "magnitude"] = "least_squares"
    spread: Literal["even", "loss"] = "even"
    multiple_of: Annotated[int, Field(ge=1)] = 64

    @model_validator(mode="before")
    @classmethod
    def _in_order(cls, fields: Any) -> Any:
        return sorted_along(fields, "widths")

    @model_validator(mode="after")
    def _one_of(self) -> PruneWidth:
        exactly_one("prune_width", width=self.width, keep=self.keep, widths=self.widths)
        if self.widths is not None and len(self.widths) != len(self.layers or ()):
            raise ValueError("prune_width: widths are one for each of layers")
        if self.spread == "loss" and (self.keep is None or self.score != "least_squares"):
            raise ValueError("prune_width: spread: loss goes with keep and score: least_squares")
        return self

    def needs(self) -> frozenset[str]:
        return frozenset(SCORES[self.score])

    def requests(self, subject: Subject) -> tuple[Request, ...]:
        if self.score != "least_squares":
            return (*super().requests(subject),)
        spec = subject.spec
        layers = frozenset(layer for index in self.affected(subject) for layer in spec.layers[index].parents)
        return (Channels(SCORES[self.score][0], layers),)

    def foresee(self, subject: Subject) -> Mapping[str, Any]:
        """Channels all alike: which of them are kept changes no shape. For `spread: loss` all layers are alike, too."""
        ffns = {layer.parents[0]: layer.ffn for layer in subject.spec.layers if layer.ffn is not None}
        flat = {number: torch.zeros(ffn.width) for number, ffn in ffns.items()}
        curves = {number: torch.linspace(1, 0, ffn.width + 1).square() for number, ffn in ffns.items()}
        alike = {"ffn_channel": flat, "ffn_elimination": flat, "ffn_elimination_loss": curves}
        return {name: alike[name] for name in self.needs()}

    def affected(self, subject: Subject) -> list[int]:
        """Positions of the layers whose FFNs are cut.

        Raises:
            SurgeryError: a layer does not exist.
        """
        return subject.positions(self.layers, "ffn", self.op)

    @classmethod
    def offers(cls, subject: Subject, grain: int) -> list[Offer]:
        offers = []
        for number in with_part(subject, "ffn"):
            ffn = subject.spec.layers[subject.position(number)].ffn
            if ffn is not None and ffn.plain:
                # Of a narrow FFN no two of these shares may fall together.
                multiple = min(grain, 2 ** max(0, (ffn.width // 16).bit_length() - 1))
                offers += [
                    Offer((number,), "ffn", f"{width} channels", (cls(layers=(number,), widths=(width,)),))
                    for width in shares_of(ffn.width, SHARES, multiple)
                ]
        return offers

    @classmethod
    def merged(cls, steps: Sequence[Self]) -> list[Step]:
        layers = [layer for step in steps for layer in step.layers or ()]
        return [cls(layers=tuple(layers), widths=tuple(width for step in steps for width in step.widths or ()))]

    def resolve(self, subject: Subject) -> PruneWidth:
        if self.spread != "loss":
            return self
        layers = [subject.spec.layers[index] for index in self.affected(subject)]
        losses = subject.score("ffn_elimination_loss", "prune_width")
        mine = {}
        for layer in layers:
            number = layer.parents[0]
            if layer.ffn is None:
                raise subject.refuse(f"prune_width: layer {number} has no FFN")
            if len(layer.parents) > 1:
                raise subject.refuse("prune_width: cut widths before fusing, scores exist for the parent's layers only")
            mine[number] = parents_scores(losses[number], layer.ffn.width + 1, "prune_width", number, subject)
        widths = widths_by_loss(mine, self.keep or 1, self.multiple_of)
        return PruneWidth(layers=tuple(widths), widths=tuple(widths.values()), multiple_of=self.multiple_of)

    def plan(self, subject: Subject) -> Plan:
        subject.check(self)
        layers = all_kept(subject)
        widths = dict(zip(self.layers or (), self.widths or (), strict=False))
        for index in self.affected(subject):
            layers[index] = self._narrowed(subject, layers[index], widths)
        return assemble(subject, layers)

    def _target(self, ffn: FFNSpec, layer: int, widths: Mapping[int, int]) -> int:
        if self.width is not None or widths:
            return self.width or widths[layer]
        rounded = round(ffn.width * (self.keep or 1) / self.multiple_of) * self.multiple_of
        return min(ffn.width, max(self.multiple_of, rounded))

    def _narrowed(self, subject: Subject, layer: NewLayer, widths: Mapping[int, int]) -> NewLayer:
        family, ffn, number = subject.family, layer.spec.ffn, layer.spec.parents[0]
        if ffn is None:
            raise subject.refuse(f"prune_width: layer {number} has no FFN")
        width = self._target(ffn, number, widths)
        if width > ffn.width:
            raise subject.refuse(f"prune_width: layer {number} has {ffn.width} channels, {width} asked for")
        names = {suffix: str(name) for suffix, name in layer.tensors.items()}
        in_weights = tuple(names[family.ffn_tensor(p)] for p in family.ffn_in)
        out_weight = names[family.ffn_tensor(family.ffn_out)]
        score_sources: tuple[str, ...]
        if self.score != "magnitude":
            if len(layer.spec.parents) > 1:
                raise subject.refuse("prune_width: cut widths before fusing, scores exist for the parent's layers only")
            scores = subject.score(SCORES[self.score][0], "prune_width")
            chosen = top_channels(parents_scores(scores[number], ffn.width, "prune_width", number, subject), width)
            score_sources, choose = (), _constant(chosen)
        else:
            score_sources = (*in_weights, out_weight)
            choose = _by_magnitude(width, family.transposed, family.ffn_stacked)

        def select(dim: int, stacked: int = 1) -> Callable[..., Tensor]:
            def selected(weight: Tensor, *scored: Tensor) -> Tensor:
                kept = choose(*scored).to(weight.device)
                parts = [part.index_select(dim, kept) for part in weight.chunk(stacked)]
                return parts[0] if stacked == 1 else torch.cat(parts)

            return selected

        channel_dim = 1 if family.transposed else 0
        tensors: dict[str, str | Computed] = dict(layer.tensors)
        for projection in family.ffn_in:
            for kind, dim in (("weight", channel_dim), ("bias", 0)):
                suffix = family.ffn_tensor(projection, kind)
                if suffix in names:
                    tensors[suffix] = Computed((names[suffix], *score_sources), select(dim, family.ffn_stacked))
        tensors[family.ffn_tensor(family.ffn_out)] = Computed((out_weight, *score_sources), select(1 - channel_dim))
        return NewLayer(replace(layer.spec, ffn=replace(ffn, width=width)), tensors)


def _constant(indices: Tensor) -> Callable[..., Tensor]:
    return lambda: indices


def _by_magnitude(width: int, transposed: bool, stacked: int) -> Callable[..., Tensor]:
    def choose(*weights: Tensor) -> Tensor:
        if weights[0].is_meta:
            return torch.arange(width)
        *readers, out = [w.T for w in weights] if transposed else list(weights)
        return top_channels(channel_magnitudes(tuple(p for w in readers for p in w.chunk(stacked)), out), width)

    return choose
