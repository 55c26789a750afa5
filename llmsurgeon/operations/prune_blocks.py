"""Remove whole blocks: by the logits' divergence, scored anew after each removal (SLEB, arXiv 2402.09025) or once; by
block influence (ShortGPT, arXiv 2403.03853); or the contiguous window with the least angular distance (The Unreasonable
Ineffectiveness of the Deeper Layers, arXiv 2403.17887).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from llmsurgeon.model.layers import LayerList
from llmsurgeon.model.parts import Touch
from llmsurgeon.operations.base import Plan, Step, Subject, all_kept, assemble, exactly_one, lowest

BLOCK_SCORES = {"rescored": "block_order", "influence": "block_influence", "kl": "block_kl"}


class PruneBlocks(Step):
    """Drop blocks `layers`, or the `count` of least `score`, or the contiguous `window` of least angular distance.

    score: `rescored` scores what is left after each removal; `kl` and `influence` score single removals on the intact
        model.
    """

    op: Literal["prune_blocks"] = "prune_blocks"
    touches: ClassVar[frozenset[Touch]] = frozenset({Touch.REMOVES_LAYERS})
    layers: LayerList | None = None
    count: Annotated[int, Field(ge=1)] | None = None
    window: Annotated[int, Field(ge=1)] | None = None
    score: Literal["rescored", "influence", "kl"] = "influence"

    @model_validator(mode="after")
    def _one_of(self) -> PruneBlocks:
        exactly_one("prune_blocks", layers=self.layers, count=self.count, window=self.window)
        return self

    def needs(self) -> frozenset[str]:
        if self.layers is not None:
            return frozenset()
        return frozenset({"angular_distance" if self.window else BLOCK_SCORES[self.score]})

    def resolve(self, subject: Subject) -> PruneBlocks:
        if self.layers is not None:
            return self
        if self.window is not None:
            return PruneBlocks(layers=self._nearest_window(subject, self.window))
        present = [block.parents[0] for block in subject.spec.layers]
        if self.score == "rescored":
            order = [layer for layer in subject.score("block_order", "prune_blocks") if layer in present]
            if len(order) < (self.count or 0):
                raise subject.refuse(f"prune_blocks: {self.count} blocks asked for, only {len(order)} can go")
            return PruneBlocks(layers=tuple(sorted(order[: self.count])))
        scores = [float(v) for v in subject.score(BLOCK_SCORES[self.score], "prune_blocks")]
        return PruneBlocks(layers=lowest(scores, present, self.count or 0, "prune_blocks"))

    @staticmethod
    def _nearest_window(subject: Subject, size: int) -> tuple[int, ...]:
        # distances[n - 1][l] is the angular distance between the inputs of blocks l and l + n.
        distances = subject.score("angular_distance", "prune_blocks")
        if size > len(distances):
            raise subject.refuse(f"prune_blocks: window {size} is longer than the model ({len(distances)} blocks)")
        candidates = [float(distances[size - 1][start]) for start in range(len(distances) - size + 1)]
        start = candidates.index(min(candidates))
        return tuple(range(start, start + size))

    def plan(self, subject: Subject) -> Plan:
        subject.check(self)
        gone = {subject.position(layer, "prune_blocks: layer") for layer in self.layers or ()}
        return assemble(subject, [block for index, block in enumerate(all_kept(subject)) if index not in gone])
