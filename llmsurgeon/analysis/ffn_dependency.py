"""How much each FFN depends on those before it, once the attentions between them are gone (FFN Fusion, section 3).

Shapes: N layers, S sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmsurgeon.analysis.greedy import SEARCH_TOKENS
from llmsurgeon.analysis.measure import evaluations, mean_or_nan
from llmsurgeon.analysis.score import Scene, Score
from llmsurgeon.analysis.similarity import cosine
from llmsurgeon.operations.prune_attention import Dropped
from llmsurgeon.processes.share import Share
from llmsurgeon.progress import Progress
from llmsurgeon.walk.runner import LayerRunner
from llmsurgeon.walk.variants import Variant
from llmsurgeon.walk.walk import Course, Parts, walk


def ffn_dependency(runner: LayerRunner, tokens: Tensor, dropped: frozenset[int], batch: int = 4) -> Tensor:
    """M for FFNs alone, with the attentions of `dropped` already gone. [N, N], NaN outside j > i."""
    layers = len(runner.layers)
    base = Variant(no_attention=dropped)
    variants = [base, *(Variant(no_attention=dropped, no_ffn=frozenset({layer})) for layer in range(layers))]
    share = Share.of(len(tokens))
    tokens = share.mine(tokens)
    sums, counts = torch.zeros(layers, layers, dtype=torch.float64), torch.zeros(layers, layers)

    def observe(layer: int, part: slice, variant: int, mine: Parts, parent: Parts) -> None:
        if variant and variant - 1 < layer and mine.ffn is not None and parent.ffn is not None:
            distance = 1 - cosine(mine.ffn, parent.ffn)
            sums[variant - 1, layer] += distance.sum().item()
            counts[variant - 1, layer] += distance.numel()

    work = evaluations(layers, [len(tokens)] * len(variants)) * tokens.shape[1]
    with Progress("measure FFN dependencies", work, "token-layers") as progress:
        walk(runner, tokens, variants, observe, batch=batch, course=Course(progress=progress.advance))
    share.add_up(sums, counts)
    return mean_or_nan(sums, counts)


def _measured(scene: Scene, requests: Sequence[Any]) -> Mapping[str, Any]:
    gone = [request for request in requests if isinstance(request, Dropped)]
    dropped = frozenset(layer for request in gone for layer in request.layers(scene.subject))
    return {"ffn_dependency": ffn_dependency(scene.runner, scene.tokens, dropped, scene.batch)}


FFN_DEPENDENCY = Score(_measured, tokens=SEARCH_TOKENS)
