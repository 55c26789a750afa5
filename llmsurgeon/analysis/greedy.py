"""One layer after the other goes, each time the one that costs the logits least (SLEB, arXiv 2402.09025).

Single removals, scored on the intact model, say little about the eighth removal: every choice here is made by what
dropping does to the logits, and scored anew after each step, with the replace-one score of Puzzle (arXiv 2411.19146).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from llmsurgeon.analysis.divergence import divergences
from llmsurgeon.processes.share import Share
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


@dataclass(frozen=True)
class Removal:
    """What goes, layer by layer.

    increase: by candidate, how much its going is thought to raise the KL.
    variant: the parent without these layers' parts; allowed: whether they may go together.
    first, later: how many candidates are scored in the first step and in later ones, those of least increase.
    """

    title: str
    increase: Mapping[int, float]
    variant: Callable[[frozenset[int]], Variant]
    allowed: Callable[[frozenset[int]], bool]
    first: int
    later: int


def greedy(runner: LayerRunner, tokens: Tensor, count: int, removal: Removal, batch: int) -> list[Choice]:
    """Remove the layer that raises the KL least, `count` times."""
    share = Share.of(len(tokens))
    tokens = share.mine(tokens)
    increase = dict(removal.increase)
    parent: Tensor | None = None
    dropped: frozenset[int] = frozenset()
    choices: list[Choice] = []
    current = 0.0
    with Progress(removal.title, count, "steps") as progress:
        for step in range(count):
            ranked = sorted(increase, key=lambda c: (increase[c], c))
            open_ = [layer for layer in ranked if layer not in dropped and removal.allowed(dropped | {layer})]
            candidates = sorted(open_[: removal.later if step else removal.first])
            if not candidates:
                break
            variants = [removal.variant(dropped), *(removal.variant(dropped | {layer}) for layer in candidates)]
            streams = walk(runner, tokens, variants, batch=batch)
            parent = streams[0].clone() if parent is None else parent
            mine = divergences(runner, streams, [len(tokens)] * len(variants), parent)
            kl = share.every(mine, dim=1).mean(1).tolist()
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
