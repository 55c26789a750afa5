"""Which attentions go, chosen together with the FFN runs that their going makes; and which blocks.

Dropping the attention of block i lets FFN i join the run of FFN i - 1. Single removals, scored on the intact model,
say little about the eighth removal: every choice here is made by what dropping and fusing does to the logits, and
scored anew after each step (greedy removal as in SLEB, arXiv 2402.09025, with the replace-one score of Puzzle,
arXiv 2411.19146).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmsurgeon.analysis.measure import divergences
from llmsurgeon.progress import Progress
from llmsurgeon.walk.runner import LayerRunner
from llmsurgeon.walk.variants import Variant
from llmsurgeon.walk.walk import walk

# Tokens that rank the candidates: layers differ far more than these few tokens' means are unsure.
SEARCH_TOKENS = 1536


@dataclass(frozen=True)
class Choice:
    """One step of the search: the layer whose parts went, the KL afterwards, what the others would have cost."""

    layer: int
    kl: float
    candidates: dict[int, float]


def runs_of(dropped: frozenset[int], layers: int) -> tuple[tuple[int, ...], ...]:
    """Runs that form when the attentions of `dropped` go: a block and the attention-free blocks behind it."""
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
    candidates that last raised it least are scored again. The first block keeps its attention, and the last FFN is
    never fused, which hurts most (FFN Fusion, arXiv 2503.18908, section 4). Weights are read once per step.

    Args:
        tokens: [S, T]; a few thousand are enough to rank layers.
        attention_kl: by layer, the KL when its attention goes alone, nothing fused. With it the first step scores
            only the 2 `width` lowest instead of all, and it stands for the increase of layers not scored yet.
        max_run: the most blocks that a run may have.
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
    title = "choose attentions and runs"
    return _greedy(runner, tokens, count, increase, variant, allowed, (first, width), batch, title)


def search_blocks(runner: LayerRunner, tokens: Tensor, count: int, *, width: int = 8, batch: int = 4) -> list[Choice]:
    """The blocks to drop, in the order of dropping, by KL(parent || model without them); scored anew after each.

    Single removals, scored on the intact model, say little about the third one next to two that went (SLEB,
    arXiv 2402.09025). The first step scores all blocks, later ones the `width` that last raised the KL least.

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
    return _greedy(runner, tokens, count, increase, variant, allowed, (layers, width), batch, "choose blocks")


def _greedy(
    runner: LayerRunner,
    tokens: Tensor,
    count: int,
    increase: dict[int, float],
    variant: Callable[[frozenset[int]], Variant],
    allowed: Callable[[frozenset[int]], bool],
    widths: tuple[int, int],
    batch: int,
    title: str,
) -> list[Choice]:
    """Remove the layer that raises the KL least, `count` times.

    Args:
        increase: by candidate, how much its removal is thought to raise the KL.
        variant: the parent without these layers' parts; `allowed` tells whether they may go together.
        widths: how many candidates are scored in the first step, and in later ones: those of least `increase`.
    """
    parent: Tensor | None = None
    dropped: frozenset[int] = frozenset()
    choices: list[Choice] = []
    current = 0.0
    with Progress(title, count, "steps") as progress:
        for step in range(count):
            ranked = sorted(increase, key=lambda c: (increase[c], c))
            open_ = [layer for layer in ranked if layer not in dropped and allowed(dropped | {layer})]
            candidates = sorted(open_[: widths[1] if step else widths[0]])
            if not candidates:
                break
            variants = [variant(dropped), *(variant(dropped | {layer}) for layer in candidates)]
            streams = walk(runner, tokens, variants, batch=batch)
            parent = streams[0].clone() if parent is None else parent
            kl = divergences(runner, streams, [len(tokens)] * len(variants), parent).mean(1).tolist()
            scored = dict(zip(candidates, kl[1:], strict=True))
            for layer, value in scored.items():
                increase[layer] = value - current
            best = min(scored, key=lambda layer: (scored[layer], layer))
            dropped, current = dropped | {best}, scored[best]
            choices.append(Choice(best, current, scored))
            progress.advance()
    return choices


def order_of(choices: list[Choice]) -> list[int]:
    """Layers in the order in which their parts go."""
    return [choice.layer for choice in choices]


def default_count(layers: int) -> int:
    """How many attentions to drop when nobody says: about a quarter of them."""
    return max(1, round(layers * 0.27))


def few(tokens: Tensor, wanted: int) -> Tensor:
    """About `wanted` tokens: whole sequences, spread evenly."""
    count = max(1, min(len(tokens), wanted // tokens.shape[1]))
    return tokens[torch.linspace(0, len(tokens) - 1, count).round().long()]
