"""Remove attention from layers; what stays is x + FFN(norm(x)).

LLM-Drop (arXiv 2406.15786) drops the attentions whose output changes the stream least; Puzzle
(arXiv 2411.19146) scores a removal by the divergence of the logits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from pydantic import model_validator

from llmsurgeon.model.parts import Touch
from llmsurgeon.operations.base import NewLayer, Offer, Plan, Request, Subject, all_kept, assemble, exactly_one
from llmsurgeon.operations.ranked import Ranked, Ranking, removals, with_part

RANKINGS = {
    "joint": Ranking(
        "attention_order",
        order=("attentions", " with runs of this length; lower count or raise fuse_ffn's max_run"),
    ),
    "kl": Ranking("attention_kl"),
    "similarity": Ranking("attention_similarity", highest=True),
}


class PruneAttention(Ranked):
    """Drop attention in `layers`, or in the `count` layers that matter least by `score`.

    score: `joint` re-scores after each removal, with the runs that form fused; `kl` and `similarity` score single
    removals on the intact model.
    """

    op: Literal["prune_attention"] = "prune_attention"
    touches: ClassVar[frozenset[Touch]] = frozenset({Touch.REMOVES_ATTENTION})
    score: Literal["joint", "kl", "similarity"] = "joint"

    @model_validator(mode="after")
    def _one_of(self) -> PruneAttention:
        exactly_one("prune_attention", layers=self.layers, count=self.count)
        return self

    def ranking(self) -> Ranking:
        return RANKINGS[self.score]

    def candidates(self, subject: Subject) -> list[int]:
        return with_part(subject, "attention")

    def requests(self, subject: Subject) -> tuple[Request, ...]:
        return (*super().requests(subject), Dropped("ffn_dependency", self))

    @classmethod
    def offers(cls, subject: Subject, grain: int) -> list[Offer]:
        return removals(cls, with_part(subject, "attention"), "attention")

    def plan(self, subject: Subject) -> Plan:
        subject.check(self)
        return drop_part(subject, "attention", self.layers or ())


@dataclass(frozen=True)
class Dropped(Request):
    """Attentions will be gone; which ones, other scores may tell."""

    step: PruneAttention

    def layers(self, subject: Subject) -> tuple[int, ...]:
        """Parent layers of these attentions, by the scores that `subject` knows."""
        resolved = self.step.resolve(subject)
        assert isinstance(resolved, PruneAttention)
        return resolved.layers or ()


def drop_part(subject: Subject, part: Literal["attention", "ffn"], numbers: tuple[int, ...]) -> Plan:
    """Remove attention or FFN from the layers that have these numbers in the parent.

    Raises:
        SurgeryError: a layer does not exist or has no such part.
    """
    family = subject.family
    belongs = family.is_attention if part == "attention" else family.is_ffn
    norm = f"{family.attention_norm if part == 'attention' else family.ffn_norm}."
    layers = all_kept(subject)
    for number in numbers:
        index = subject.position(number, f"prune_{part}: layer")
        layer = layers[index]
        if getattr(layer.spec, part) is None:
            raise subject.refuse(f"prune_{part}: layer {number} has no {part} to drop")
        # A norm behind the residual sum stays, and one that the FFN reads, too.
        shared = family.shares_norm and part == "attention" and layer.spec.ffn and not layer.spec.ffn.own_norm
        stays = norm if family.post_norm or shared else None
        tensors = {
            suffix: name
            for suffix, name in layer.tensors.items()
            if not belongs(suffix) or (stays and suffix.startswith(stays))
        }
        spec = replace(layer.spec, attention=None) if part == "attention" else replace(layer.spec, ffn=None)
        layers[index] = NewLayer(spec, tensors)
    return assemble(subject, layers)
