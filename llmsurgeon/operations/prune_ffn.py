"""Remove the FFN from layers; what stays is x + Attn(norm(x))."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import model_validator

from llmsurgeon.model.parts import Touch
from llmsurgeon.operations.base import Offer, Plan, Subject, exactly_one
from llmsurgeon.operations.prune_attention import drop_part
from llmsurgeon.operations.ranked import Ranked, Ranking, removals, with_part

RANKINGS = {"kl": Ranking("ffn_kl"), "similarity": Ranking("ffn_similarity", highest=True)}


class PruneFFN(Ranked):
    """Drop the FFN in `layers`, or in the `count` layers that matter least by `score`."""

    op: Literal["prune_ffn"] = "prune_ffn"
    touches: ClassVar[frozenset[Touch]] = frozenset({Touch.REMOVES_FFN})
    score: Literal["kl", "similarity"] = "kl"

    @model_validator(mode="after")
    def _one_of(self) -> PruneFFN:
        exactly_one("prune_ffn", layers=self.layers, count=self.count)
        return self

    def ranking(self) -> Ranking:
        return RANKINGS[self.score]

    def candidates(self, subject: Subject) -> list[int]:
        return with_part(subject, "ffn")

    @classmethod
    def offers(cls, subject: Subject, grain: int) -> list[Offer]:
        return removals(cls, with_part(subject, "ffn"), "ffn")

    def plan(self, subject: Subject) -> Plan:
        subject.check(self)
        return drop_part(subject, "ffn", self.layers or ())
