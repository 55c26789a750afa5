"""Narrower FFNs: keep the inner channels that matter most.

A channel's score is mean |activation| * ||its column of the down projection|| when the analysis has run
(`score: activation`), or the product of its weight norms (`score: magnitude`), which needs no data.
Compare Minitron (arXiv 2407.14679, section 2.2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from llmsurgeon.layers import LayerList
from llmsurgeon.operations.base import Computed, NewBlock, Plan, Step, Subject, all_kept, assemble, exactly_one
from llmsurgeon.spec import FFNSpec


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


class PruneWidth(Step):
    """Cut FFNs to `width` channels, or to the fraction `keep` rounded to `multiple_of`."""

    op: Literal["prune_width"] = "prune_width"
    width: Annotated[int, Field(ge=1)] | None = None
    keep: Annotated[float, Field(gt=0, le=1)] | None = None
    layers: LayerList | None = None
    score: Literal["activation", "magnitude"] = "activation"
    multiple_of: Annotated[int, Field(ge=1)] = 64

    @model_validator(mode="after")
    def _one_of(self) -> PruneWidth:
        exactly_one("prune_width", width=self.width, keep=self.keep)
        return self

    def needs(self) -> frozenset[str]:
        return frozenset({"ffn_channel"} if self.score == "activation" else ())

    def foresee(self, subject: Subject) -> Mapping[str, Any]:
        """Channels all alike: which of them are kept changes no shape."""
        ffns = {block.parents[0]: block.ffn for block in subject.spec.blocks if block.ffn is not None}
        found = {layer: torch.zeros(ffn.width) for layer, ffn in ffns.items()}
        return {"ffn_channel": found} if self.score == "activation" else {}

    def plan(self, subject: Subject) -> Plan:
        subject.check(self.op)
        blocks = all_kept(subject)
        if self.layers is None:
            indices = [i for i, block in enumerate(subject.spec.blocks) if block.ffn is not None]
        else:
            indices = [subject.position(layer, "prune_width: layer") for layer in self.layers]
        for index in indices:
            blocks[index] = self._narrowed(subject, blocks[index])
        return assemble(subject, blocks)

    def _target(self, ffn: FFNSpec) -> int:
        if self.width is not None:
            return self.width
        rounded = round(ffn.width * (self.keep or 1) / self.multiple_of) * self.multiple_of
        return min(ffn.width, max(self.multiple_of, rounded))

    def _narrowed(self, subject: Subject, block: NewBlock) -> NewBlock:
        family, ffn, layer = subject.family, block.spec.ffn, block.spec.parents[0]
        if ffn is None:
            raise subject.refuse(f"prune_width: layer {layer} has no FFN")
        width = self._target(ffn)
        if width > ffn.width:
            raise subject.refuse(f"prune_width: layer {layer} has {ffn.width} channels, {width} asked for")
        names = {suffix: str(name) for suffix, name in block.tensors.items()}
        in_weights = tuple(names[family.ffn_tensor(p)] for p in family.ffn_in)
        out_weight = names[family.ffn_tensor(family.ffn_out)]
        score_sources: tuple[str, ...]
        if self.score == "activation":
            if len(block.spec.parents) > 1:
                raise subject.refuse("prune_width: cut widths before fusing, scores exist for the parent's layers only")
            chosen = top_channels(torch.as_tensor(subject.score("ffn_channel", "prune_width")[layer]), width)
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
        tensors: dict[str, str | Computed] = dict(block.tensors)
        for projection in family.ffn_in:
            for kind, dim in (("weight", channel_dim), ("bias", 0)):
                suffix = family.ffn_tensor(projection, kind)
                if suffix in names:
                    tensors[suffix] = Computed((names[suffix], *score_sources), select(dim, family.ffn_stacked))
        tensors[family.ffn_tensor(family.ffn_out)] = Computed((out_weight, *score_sources), select(1 - channel_dim))
        return NewBlock(replace(block.spec, ffn=replace(ffn, width=width)), tensors)


def _constant(indices: Tensor) -> Callable[..., Tensor]:
    return lambda: indices


def _by_magnitude(width: int, transposed: bool, stacked: int) -> Callable[..., Tensor]:
    def choose(*weights: Tensor) -> Tensor:
        if weights[0].is_meta:
            return torch.arange(width)
        *readers, out = [w.T for w in weights] if transposed else list(weights)
        return top_channels(channel_magnitudes(tuple(p for w in readers for p in w.chunk(stacked)), out), width)

    return choose
