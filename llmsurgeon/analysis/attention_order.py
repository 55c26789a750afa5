"""Which attentions go, chosen together with the FFN runs that their going makes.

Dropping the attention of layer i lets FFN i join the run of FFN i - 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from llmsurgeon.analysis.greedy import SEARCH_TOKENS, Choice, Removal, greedy, order_of
from llmsurgeon.analysis.score import Scene, Score
from llmsurgeon.operations.fuse_ffn import Fused
from llmsurgeon.operations.ranked import Wanted
from llmsurgeon.walk.runner import LayerRunner
from llmsurgeon.walk.variants import Variant


def runs_of(dropped: frozenset[int], layers: int) -> tuple[tuple[int, ...], ...]:
    """Runs that form when the attentions of `dropped` go: a layer and the attention-free layers behind it."""
    runs, start = [], 0
    for layer in range(1, layers + 1):
        if layer == layers or layer not in dropped:
            if layer - start > 1:
                runs.append(tuple(range(start, layer)))
            start = layer
    return tuple(runs)


def variant_without(dropped: frozenset[int], layers: int, fuse: bool = True) -> Variant:
    """The parent without these attentions, its runs fused (or left in sequence)."""
    return Variant(no_attention=dropped, runs=runs_of(dropped, layers) if fuse else ())


def search_attentions(
    runner: LayerRunner,
    tokens: Tensor,
    count: int,
    max_run: int,
    *,
    fuse: bool = True,
    width: int = 6,
    batch: int = 4,
    attention_kl: Sequence[float] | None = None,
) -> list[Choice]:
    """Greedy joint choice of `count` attentions by KL(parent || dropped and fused).

    A layer's increase of the KL changes slowly, and mostly upwards, as others go: at each step only the `width`
    candidates that last raised it least are scored again. The first layer keeps its attention, and the last FFN is
    never fused, which hurts most (FFN Fusion, arXiv 2503.18908, section 4). Weights are read once per step.

    Args:
        tokens: [S, T]; a few thousand are enough to rank layers.
        attention_kl: by layer, the KL when its attention goes alone, nothing fused. With it the first step scores
            only the 2 `width` lowest instead of all, and it stands for the increase of layers not scored yet.
        max_run: the most layers that a run may have.
        fuse: score with the runs fused; without, attentions just go, and runs of any length may form.
    """
    layers = len(runner.layers)
    attends = [runner.attends(layer) for layer in range(layers)]
    known = [0.0] * layers if attention_kl is None else attention_kl
    increase = {layer: known[layer] for layer in range(1, layers - 1 if fuse else layers) if attends[layer]}

    def allowed(dropped: frozenset[int]) -> bool:
        return not fuse or max(map(len, runs_of(dropped, layers)), default=0) <= max_run

    def variant(dropped: frozenset[int]) -> Variant:
        return variant_without(dropped, layers, fuse)

    first = len(increase) if attention_kl is None else 2 * width
    removal = Removal("choose attentions and runs", increase, variant, allowed, first, width)
    return greedy(runner, tokens, count, removal, batch)


def default_count(layers: int) -> int:
    """How many attentions to drop when nobody says: about a quarter of them."""
    return max(1, round(layers * 0.27))


def _measured(scene: Scene, requests: Sequence[Wanted | Fused]) -> Mapping[str, Any]:
    count = max(request.count for request in requests if isinstance(request, Wanted))
    runs = [request.max_run for request in requests if isinstance(request, Fused)]
    fuse, longest = bool(runs), max(runs, default=0)
    choices = search_attentions(scene.runner, scene.tokens, count, longest, fuse=fuse, batch=scene.batch)
    return {"attention_order": order_of(choices)}


ATTENTION_ORDER = Score(_measured, tokens=SEARCH_TOKENS)
