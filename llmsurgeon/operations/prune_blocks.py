"""Remove whole blocks: by the logits' divergence, scored anew after each removal (SLEB, arXiv 2402.09025) or once; by
block influence (ShortGPT, arXiv 2403.03853); or the contiguous window with the least angular distance (The Unreasonable
Ineffectiveness of the Deeper Layers, arXiv 2403.17887).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from llmsurgeon.model.parts import Touch
from llmsurgeon.operations.base import Offer, Plan, Step, Subject, all_kept, assemble, exactly_one
from llmsurgeon.operations.ranked import Ranked, Ranking, removals

RANKINGS = {
    "rescored": Ranking("block_order", order=("blocks", "")),
    "influence": Ranking("block_influence"),
    "kl": Ranking("block_kl"),
}


class PruneBlocks(Ranked):
    """Drop blocks `layers`, or the `count` of least `score`, or the contiguous `window` of least angular distance.

    score: `rescored` scores what is left after each removal; `kl` and `influence` score single removals on the intact
        model.
    """

    op: Literal["prune_blocks"] = "prune_blocks"
    touches: ClassVar[frozenset[Touch]] = frozenset({Touch.REMOVES_LAYERS})
    window: Annotated[int, Field(ge=1)] | None = None
    score: Literal["rescored", "influence", "kl"] = "influence"

    @model_validator(mode="after")
    def _one_of(self) -> PruneBlocks:
        exactly_one("prune_blocks", layers=self.layers, count=self.count, window=self.window)
        return self

    def ranking(self) -> Ranking:
        return RANKINGS[self.score]

    def candidates(self, subject: Subject) -> list[int]:
        return [layer.parents[0] for layer in subject.spec.layers]

    def needs(self) -> frozenset[str]:
        return super().needs() if self.window is None else frozenset({"angular_distance"})

    def resolve(self, subject: Subject) -> Step:
        if self.window is None:
            return super().resolve(subject)
        return PruneBlocks(layers=self._nearest_window(subject, self.window))

    @staticmethod
    def _nearest_window(subject: Subject, size: int) -> tuple[int, ...]:
        # distances[n - 1][l] is the angular distance between the inputs of blocks l and l + n.
        distances = subject.score("angular_distance", "prune_blocks")
        if size > len(distances):
            raise subject.refuse(f"prune_blocks: window {size} is longer than the model ({len(distances)} blocks)")
        candidates = [float(distances[size - 1][start]) for start in range(len(distances) - size + 1)]
        start = candidates.index(min(candidates))
        return tuple(range(start, start + size))

    @classmethod
    def offers(cls, subject: Subject, grain: int) -> list[Offer]:
        return removals(cls, [layer.parents[0] for layer in subject.spec.layers], "all")

    def plan(self, subject: Subject) -> Plan:
        subject.check(self)
        gone = {subject.position(number, "prune_blocks: layer") for number in self.layers or ()}
        return assemble(subject, [layer for index, layer in enumerate(all_kept(subject)) if index not in gone])
