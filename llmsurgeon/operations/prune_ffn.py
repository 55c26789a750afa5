"""Remove the FFN from blocks; what stays is x + Attn(norm(x))."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from llmsurgeon.model.layers import LayerList
from llmsurgeon.model.parts import Touch
from llmsurgeon.operations.base import Plan, Step, Subject, exactly_one
from llmsurgeon.operations.prune_attention import SUBLAYER_SCORES, choose_sublayers, drop_part


class PruneFFN(Step):
    """Drop the FFN in `layers`, or in the `count` layers that matter least by `score`."""

    op: Literal["prune_ffn"] = "prune_ffn"
    touches: ClassVar[frozenset[Touch]] = frozenset({Touch.REMOVES_FFN})
    layers: LayerList | None = None
    count: Annotated[int, Field(ge=1)] | None = None
    score: Literal["kl", "similarity"] = "kl"

    @model_validator(mode="after")
    def _one_of(self) -> PruneFFN:
        exactly_one("prune_ffn", layers=self.layers, count=self.count)
        return self

    def needs(self) -> frozenset[str]:
        return frozenset() if self.layers is not None else frozenset({f"ffn_{SUBLAYER_SCORES[self.score][0]}"})

    def resolve(self, subject: Subject) -> PruneFFN:
        if self.count is None:
            return self
        return PruneFFN(layers=choose_sublayers(subject, "ffn", self.count, self.score, "prune_ffn"))

    def plan(self, subject: Subject) -> Plan:
        subject.check(self)
        return drop_part(subject, "ffn", self.layers or ())
