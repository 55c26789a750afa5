"""Align: what the student's projections read is brought back to what the parent's read.

What a projection W reads has drifted from what it read in the parent. The linear map that brings the student's normed
inputs A nearest to the parent's, B, both behind the student's norm, is folded into the weights that read them:

    W <- W (I + M),  M = argmin ||A (I + M^T) - B||^2 + ridge * mean(diag(A^T A)) ||M||^2

Shapes: n tokens, D model width: A, B [n, D]; W [O, D].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmsurgeon.healing.refit.context import LayerFit
from llmsurgeon.healing.refit.ridge import best_update
from llmsurgeon.model.families.base import Family
from llmsurgeon.model.ternary import is_ternary


def attention_drifts(here: LayerFit) -> bool:
    """True where an attention reads something new."""
    return here.options.align and here.spec.attention is not None and here.drifted


def align_attention(here: LayerFit) -> None:
    """Align what reads the attention's norm, with the parent's stream in front of the span."""
    readers = attention_readers(here.module, here.family)
    align(here, "attention input", here.module.attention_input, (here.entered, here.parent), readers)


def ffn_drifts(here: LayerFit) -> bool:
    """True where a dense FFN may be aligned, fused ones by the rows of each parent."""
    ffn = here.spec.ffn
    return here.options.align and ffn is not None and ffn.as_family and not here.family.experts


def align_ffn(here: LayerFit) -> None:
    """Align what reads the FFN's norm, each parent's rows with what that parent's FFN read."""
    for number in here.spec.parents:
        rows = rows_of(here, number)
        if rows and (here.drifted or number != here.spec.parents[0]):
            streams = here.ffn_stream(), here.read[here.span.index(number)]
            readers = ffn_readers(here.module, here.family, rows)
            align(here, f"ffn input of layer {number}", here.module.ffn_input, streams, readers)


def align(
    here: LayerFit,
    what: str,
    norm: Callable[[Tensor], Tensor],
    streams: tuple[Tensor, Tensor],
    readers: Sequence[Tensor],
) -> None:
    """Fold the map from the student's inputs to the parent's into `readers`, views of weights [O, D], if there are any.

    streams: the student's and the parent's, [S, T, D], in front of `norm`.
    """
    if not readers:
        return
    mine, theirs = streams

    def batch(part: slice) -> tuple[Tensor, Tensor]:
        own = norm(mine[part].to(here.student.device))
        return own, norm(theirs[part].to(here.student.device)).float() - own.float()

    update, ridge, error = best_update(here.moments(batch), (here.options.align_ridge,))
    here.note(what, ridge, error)
    if update is not None:
        for weight in readers:
            wide = weight.float()
            weight.copy_((wide + wide @ update.T).to(weight.dtype))


def attention_readers(module: nn.Module, family: Family) -> list[Tensor]:
    """Weights [O, D] that read the attention norm's output, as views; none of them ternary."""
    attention = getattr(module, family.attention)
    weights = [
        part.weight.data.T if family.transposed else part.weight.data
        for name, part in attention.named_modules()
        if name != family.attention_out and getattr(part, "weight", torch.empty(0)).dim() == 2
    ]
    return [weight for weight in weights if not is_ternary(weight)]


def ffn_readers(module: nn.Module, family: Family, rows: slice) -> list[Tensor]:
    """Rows [rows, D] of the weights that read the FFN norm's output, as views; none of them ternary."""
    weights: list[Any] = [module.get_submodule(family.ffn_module(name)).weight for name in family.ffn_in]
    oriented = [weight.data.T if family.transposed else weight.data for weight in weights]
    oriented = [weight for weight in oriented if not is_ternary(weight)]
    return [part[rows] for weight in oriented for part in weight.chunk(family.ffn_stacked)]


def rows_of(here: LayerFit, number: int) -> slice | None:
    """The rows of a fused FFN that came from the parent's layer `number`: each read its own input there.

    None where they cannot be told, because widths were cut before or after fusing.
    """
    spec, parents = here.spec, here.context.parent_spec.layers
    if len(spec.parents) == 1:
        return slice(None)
    widths = [ffn.width if (ffn := parents[p].ffn) else 0 for p in spec.parents]
    if spec.ffn is None or sum(widths) != spec.ffn.width:
        return None
    place = spec.parents.index(number)
    start = sum(widths[:place])
    return slice(start, start + widths[place])
