"""Which layers go, and in which order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from llmsurgeon.analysis.greedy import SEARCH_TOKENS, Choice, Removal, greedy, order_of
from llmsurgeon.analysis.score import Scene, Score
from llmsurgeon.operations.ranked import Wanted
from llmsurgeon.walk.runner import LayerRunner
from llmsurgeon.walk.variants import Variant


def search_blocks(runner: LayerRunner, tokens: Tensor, count: int, *, width: int = 8, batch: int = 4) -> list[Choice]:
    """The layers to drop, in the order of dropping, by KL(parent || model without them); scored anew after each.

    Single removals, scored on the intact model, say little about the third one next to two that went (SLEB,
    arXiv 2402.09025). The first step scores all layers, later ones the `width` that last raised the KL least.

    Args:
        tokens: [S, T]; a few thousand are enough to rank layers.
    """
    layers = len(runner.layers)
    first = 1 if runner.family.first_stays else 0
    attending = frozenset(layer for layer in range(layers) if runner.attends(layer))

    def allowed(dropped: frozenset[int]) -> bool:
        return bool(attending - dropped)

    def variant(dropped: frozenset[int]) -> Variant:
        return Variant(no_attention=dropped, no_ffn=dropped)

    increase = dict.fromkeys(range(first, layers), 0.0)
    removal = Removal("choose blocks", increase, variant, allowed, layers, width)
    return greedy(runner, tokens, count, removal, batch)


def _measured(scene: Scene, requests: Sequence[Wanted]) -> Mapping[str, Any]:
    count = max(request.count for request in requests)
    return {"block_order": order_of(search_blocks(scene.runner, scene.tokens, count, batch=scene.batch))}


BLOCK_ORDER = Score(_measured, tokens=SEARCH_TOKENS)
