"""How far a changed model's outputs are from the parent's.

Shapes: S sequences, T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmsurgeon.analysis.similarity import KLFrom, cosine_distance
from llmsurgeon.progress import Progress
from llmsurgeon.walk.runner import LayerRunner

# Logits are compared at every KL_STRIDE-th position: neighbours say much the same, and the head is dear.
KL_STRIDE = 4
# Rows of logits that are made at a time.
HEAD_ROWS = 256


def compared(length: int) -> Tensor:
    """The positions of a sequence at which outputs are compared, every KL_STRIDE-th from its end."""
    # From the end: the first positions see next to no context.
    return torch.arange(length - 1, -1, -KL_STRIDE)


def divergences(
    runner: LayerRunner,
    streams: Tensor,
    rows: Sequence[int],
    parent: Tensor | None = None,
    kept: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """KL(parent || variant) per sequence from what left the last layer, at every KL_STRIDE-th position.

    For an encoder, whose hidden states are what it is for, 1 - cos(parent's last state, variant's) takes the place of
    the KL.

    Args:
        streams: [variants, S, T, D]; `parent` [S, T, D] is streams[0] unless given.
        kept: tokens that share the probability, all unless given. lengths: of the sequences, [S], T unless given.

    Returns:
        [variants, S] in nats (cosine distances for an encoder), NaN beyond a variant's rows.
    """
    output = _output(runner, kept)
    parent = streams[0] if parent is None else parent
    positions = compared(streams.shape[2])
    each, total = len(positions), streams.shape[1] * len(positions)
    result = torch.full((len(streams), total), float("nan"))
    with torch.no_grad(), Progress("compare outputs", float(sum(rows) * each), "positions") as progress:
        for start in range(0, total, HEAD_ROWS):
            taken = torch.arange(start, min(start + HEAD_ROWS, total))
            sequence, position = taken // each, positions[taken % each]
            distance = _distance_from(runner, output(parent[sequence, position].to(runner.device)))
            for variant, count in enumerate(rows):
                stop = min(start + HEAD_ROWS, count * each)
                if start < stop:
                    own = slice(0, stop - start)
                    mine = output(streams[variant, sequence[own], position[own]].to(runner.device))
                    result[variant, start:stop] = distance(mine).cpu()
                    progress.advance(stop - start)
    found = result.view(len(streams), -1, each)
    if lengths is None:
        return found.mean(-1)
    real = positions < lengths[:, None]
    return found.where(real, 0).sum(-1) / real.sum(-1).clamp_min(1)


def _output(runner: LayerRunner, kept: Tensor | None) -> Callable[[Tensor], Tensor]:
    """What makes rows that are compared, of rows of the last layer's stream."""
    if runner.family.encoder:
        return runner.states
    if kept is None:
        return runner.final
    columns = kept.to(runner.device)
    return lambda hidden: runner.final(hidden).index_select(-1, columns)


def _distance_from(runner: LayerRunner, parent: Tensor) -> Callable[[Tensor], Tensor]:
    """What measures rows of output against the parent's, or against as many of its first rows."""
    if runner.family.encoder:
        return lambda mine: cosine_distance(parent[: len(mine)], mine)
    return KLFrom(parent)
