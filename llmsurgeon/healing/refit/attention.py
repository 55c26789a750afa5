"""Attention: the stream behind an attention is brought back to what the parent's FFN read.

So where heads went, since those that are left can stand in for them only by other columns of the output projection; and
in front of trees, which decide by what they read. With A what the output projection W_o reads, X the student's stream
behind the attention and P the parent's:

    W_o <- W_o + dW,  dW = argmin ||A dW^T - (P - X)||^2 + ridge * mean(diag(A^T A)) ||dW||^2

Shapes: n tokens, F = heads * head_dim, D model width: A [n, F]; X, P [n, D]; W_o [D, F].
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmsurgeon.healing import batches
from llmsurgeon.healing.refit.context import LayerFit, weights_in
from llmsurgeon.healing.refit.projection import attention_out, output_projection
from llmsurgeon.healing.refit.ridge import best_update
from llmsurgeon.processes.exchange import total


def feeds_trees(here: LayerFit) -> bool:
    """True where trees read behind an attention that itself reads something new."""
    drifts = here.options.align and here.drifted and here.spec.attention is not None
    return here.has_trees and drifts and not here.student.parallel_residual


def lost_heads(here: LayerFit) -> bool:
    """True where an attention has other heads than that of the one layer that it stands for."""
    mine, parents = here.spec.attention, here.context.parent_spec.layers
    if len(here.span) != 1 or here.student.parallel_residual or here.is_ternary(attention_out(here.family)):
        return False
    before = parents[here.span[0]].attention
    if mine is None or before is None:
        return False
    return mine.looks_back and before.looks_back and mine.shape != before.shape


def comes_back(here: LayerFit) -> bool:
    """True where the stream behind an attention is to be what the parent's FFN read."""
    return lost_heads(here) or feeds_trees(here)


def refit_attention(here: LayerFit) -> None:
    """Move the attention's output projection, where the stream behind it then is nearer to the parent's."""
    text, wanted, reached = here.context.batches, here.read[-1], here.behind_attention()
    out, weights = output_projection(here, "attention"), weights_in(wanted)

    def batch(part: slice) -> tuple[Tensor, Tensor]:
        here.student.attend(here.index, here.entered[part].to(here.student.device))
        missing = (wanted[part].float() - reached[part].float()).to(here.student.device)
        return out.features(), missing

    with out:
        moments = here.moments(batch, weights)
    update, ridge, error = best_update(moments, here.options.ridges)
    if update is not None:
        before = out.copies()
        out.move(update)
        moved = batches.attended(here.student, text, here.index, here.entered)
        # Behind a norm the moments promise what holds for small updates: see what this one does.
        error = _distance(here, moved, weights) / _distance(here, reached, weights)
        if error < 1:
            here.attended = moved
        else:
            out.restore(before)
            ridge, error = None, 1.0
    here.note(out.name, ridge, error)


def _distance(here: LayerFit, stream: Tensor, weights: Tensor) -> float:
    """Squared distance of a stream from what the parent's FFN read, over the sequences that judge, as tokens count."""
    judged = torch.nonzero(here.context.batches.held_out).flatten()
    wanted = here.read[-1]
    apart = (stream[judged].float() - wanted[judged].float()) * weights[judged, :, None]
    return total(apart.square().sum().item())
