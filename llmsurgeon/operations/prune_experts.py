"""Fewer experts in mixtures: in each layer those stay that the layer's output would miss most.

`reap` is the mean, over the tokens that a router sends to an expert, of router weight * ||what the expert gives||
(REAP, arXiv 2510.13999); `loss` is how far the layer's output moves when the expert alone goes and the router chooses
among the others. Router rows go along. Every layer keeps as many, so the result has its family's own form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from llmsurgeon.model.families import Family
from llmsurgeon.model.parts import MoESpec, Touch
from llmsurgeon.operations.base import Computed, NewLayer, Plan, Step, Subject, all_kept, assemble, exactly_one


class PruneExperts(Step):
    """Keep `experts` of each layer's experts, or the share `keep` of them.

    per_token: how many a token is sent to from now on; as many as before, if there are as many.
    """

    op: Literal["prune_experts"] = "prune_experts"
    touches: ClassVar[frozenset[Touch]] = frozenset({Touch.REWRITES_NEURONS})
    experts: Annotated[int, Field(ge=1)] | None = None
    keep: Annotated[float, Field(gt=0, le=1)] | None = None
    per_token: Annotated[int, Field(ge=1)] | None = None
    score: Literal["reap", "loss"] = "reap"

    @model_validator(mode="after")
    def _one_of(self) -> PruneExperts:
        exactly_one("prune_experts", experts=self.experts, keep=self.keep)
        return self

    def needs(self) -> frozenset[str]:
        return frozenset({f"expert_{self.score}"})

    def foresee(self, subject: Subject) -> Mapping[str, Any]:
        """Experts all alike: which of them are kept changes no shape."""
        mixtures = {b.parents[0]: b.ffn for b in subject.spec.layers if b.ffn and b.ffn.experts}
        return {f"expert_{self.score}": {layer: torch.zeros(ffn.experts) for layer, ffn in mixtures.items()}}

    @staticmethod
    def misfit(family: Family) -> str | None:
        return None if family.experts else "its FFNs are dense, there are no experts to drop; prune_width cuts them"

    def plan(self, subject: Subject) -> Plan:
        subject.check(self)
        layers = all_kept(subject)
        for index, layer in enumerate(layers):
            if layer.spec.branches:
                raise subject.refuse("prune_experts: blocks run in parallel; drop experts first")
            if isinstance(layer.spec.ffn, MoESpec):
                layers[index] = self._fewer(subject, layer, layer.spec.ffn)
        return assemble(subject, layers)

    def _fewer(self, subject: Subject, layer: NewLayer, ffn: MoESpec) -> NewLayer:
        family, number = subject.family, layer.spec.parents[0]
        count = self.experts if self.experts is not None else max(1, round(ffn.experts * (self.keep or 1)))
        if count > ffn.experts:
            raise subject.refuse(f"prune_experts: layer {number} has {ffn.experts} experts, {count} asked for")
        per_token = self.per_token or ffn.per_token
        if per_token > count:
            raise subject.refuse(
                f"prune_experts: a token is sent to {per_token} experts, and {count} would stay; keep at least "
                f"{per_token}, or lower per_token"
            )
        scores = torch.as_tensor(subject.score(f"expert_{self.score}", "prune_experts")[number])
        kept = scores.sort(descending=True, stable=True).indices[:count].sort().values
        place = {int(old): new for new, old in enumerate(kept)}
        prefix = f"{family.ffn}.experts."
        tensors: dict[str, str | Computed] = {}
        for suffix, name in layer.tensors.items():
            if suffix == f"{family.ffn}.gate.weight":
                tensors[suffix] = Computed((str(name),), _rows(kept))
            elif not suffix.startswith(prefix):
                tensors[suffix] = name
            else:
                expert, _, rest = suffix.removeprefix(prefix).partition(".")
                if int(expert) in place:
                    tensors[f"{prefix}{place[int(expert)]}.{rest}"] = name
        return NewLayer(replace(layer.spec, ffn=replace(ffn, experts=count, per_token=per_token)), tensors)


def _rows(kept: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda weight: weight.index_select(0, kept.to(weight.device))
