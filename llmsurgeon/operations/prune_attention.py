"""Remove attention from blocks; what stays is x + FFN(norm(x)).

LLM-Drop (arXiv 2406.15786) drops the attentions whose output changes the stream least; Puzzle
(arXiv 2411.19146) scores a removal by the divergence of the logits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from llmsurgeon.model.layers import LayerList
from llmsurgeon.model.parts import Touch
from llmsurgeon.operations.base import NewLayer, Plan, Step, Subject, all_kept, assemble, exactly_one, lowest

# Score name and whether a high value means "can go".
SUBLAYER_SCORES = {"kl": ("kl", False), "similarity": ("similarity", True)}


def choose_sublayers(subject: Subject, part: str, count: int, score: str, what: str) -> tuple[int, ...]:
    """The `count` parent layers whose attention or FFN (`part`) can go first by `score`."""
    name, highest = SUBLAYER_SCORES[score]
    values = [float(v) for v in subject.score(f"{part}_{name}", what)]
    return lowest([-v for v in values] if highest else values, with_part(subject, part), count, what)


def with_part(subject: Subject, part: str) -> list[int]:
    """Parent layers of the blocks that have attention or an FFN (`part`)."""
    return [b.parents[0] for b in subject.spec.layers if getattr(b, part) is not None and not b.branches]


class PruneAttention(Step):
    """Drop attention in `layers`, or in the `count` layers that matter least by `score`.

    score: `joint` re-scores after each removal, with the runs that form fused; `kl` and `similarity` score single
    removals on the intact model.
    """

    op: Literal["prune_attention"] = "prune_attention"
    touches: ClassVar[frozenset[Touch]] = frozenset({Touch.REMOVES_ATTENTION})
    layers: LayerList | None = None
    count: Annotated[int, Field(ge=1)] | None = None
    score: Literal["joint", "kl", "similarity"] = "joint"

    @model_validator(mode="after")
    def _one_of(self) -> PruneAttention:
        exactly_one("prune_attention", layers=self.layers, count=self.count)
        return self

    def needs(self) -> frozenset[str]:
        if self.layers is not None:
            return frozenset()
        return frozenset(
            {"attention_order" if self.score == "joint" else f"attention_{SUBLAYER_SCORES[self.score][0]}"}
        )

    def resolve(self, subject: Subject) -> PruneAttention:
        if self.count is None:
            return self
        if self.score != "joint":
            layers = choose_sublayers(subject, "attention", self.count, self.score, "prune_attention")
            return PruneAttention(layers=layers)
        present = set(with_part(subject, "attention"))
        order = [layer for layer in subject.score("attention_order", "prune_attention") if layer in present]
        if len(order) < self.count:
            raise subject.refuse(
                f"prune_attention: {self.count} attentions asked for, only {len(order)} can go with runs of this "
                "length; lower count or raise fuse_ffn's max_run"
            )
        return PruneAttention(layers=tuple(sorted(order[: self.count])))

    def plan(self, subject: Subject) -> Plan:
        subject.check(self)
        return drop_part(subject, "attention", self.layers or ())


def drop_part(subject: Subject, part: Literal["attention", "ffn"], layers: tuple[int, ...]) -> Plan:
    """Remove attention or FFN from the blocks of parent layers `layers`.

    Raises:
        SurgeryError: a layer does not exist or has no such part.
    """
    family = subject.family
    belongs = family.is_attention if part == "attention" else family.is_ffn
    norm = f"{family.attention_norm if part == 'attention' else family.ffn_norm}."
    blocks = all_kept(subject)
    for layer in layers:
        index = subject.position(layer, f"prune_{part}: layer")
        block = blocks[index]
        if getattr(block.spec, part) is None:
            raise subject.refuse(f"prune_{part}: layer {layer} has no {part} to drop")
        # A norm behind the residual sum stays, and one that the FFN reads, too.
        shared = family.shares_norm and part == "attention" and block.spec.ffn and not block.spec.ffn.own_norm
        stays = norm if family.post_norm or shared else None
        tensors = {
            suffix: name
            for suffix, name in block.tensors.items()
            if not belongs(suffix) or (stays and suffix.startswith(stays))
        }
        spec = replace(block.spec, attention=None) if part == "attention" else replace(block.spec, ffn=None)
        blocks[index] = NewLayer(spec, tensors)
    return assemble(subject, blocks)
