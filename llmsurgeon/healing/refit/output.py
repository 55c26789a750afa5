"""Output: a layer's last projection is moved so that the layer ends where the parent's span ended.

With A what the projection W_o reads, X the student's stream behind the layer and P the parent's behind the span:

    W_o <- W_o + dW,  dW = argmin ||A dW^T - (P - X)||^2 + ridge * mean(diag(A^T A)) ||dW||^2

Shapes: n tokens, F features (FFN width, or heads * head_dim), D model width: A [n, F]; X, P [n, D]; W_o [D, F].
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llmsurgeon.healing.refit.context import LayerFit, weights_in
from llmsurgeon.healing.refit.projection import attention_out, ffn_out, output_projection
from llmsurgeon.healing.refit.ridge import best_update
from llmsurgeon.processes.exchange import total


def can_move(here: LayerFit) -> bool:
    """True where a changed layer ends in a projection that a linear fit can move, and that is not ternary.

    Not so trees, a mixture of experts, and an attention without FFN whose output goes through two norms.
    """
    family = here.family
    if not here.changed or not (here.spec.ffn is None or here.spec.ffn.as_family):
        return False
    if here.spec.ffn is None:
        return not family.post_norm and not here.is_ternary(attention_out(family))
    return family.experts is None and not here.is_ternary(ffn_out(family))


def refit_output(here: LayerFit) -> None:
    """Move the last projection, and take the update back where it does not do what it promised."""
    device = here.student.device
    compute: Any = here.student.attend if here.spec.ffn is None else here.student.feed_forward
    out = output_projection(here, "attention" if here.spec.ffn is None else "ffn")
    read, start = (
        (here.entered, here.entered) if here.spec.ffn is None else (here.ffn_stream(), here.behind_attention())
    )

    def missing(part: slice) -> Tensor:
        contribution = compute(here.index, read[part].to(device)).float()
        reached = start[part].to(device).float() + contribution
        return here.parent[part].to(device).float() - reached

    def batch(part: slice) -> tuple[Tensor, Tensor]:
        what = missing(part)
        return out.features(), what

    weights = weights_in(here.parent)
    with out:
        moments = here.moments(batch, weights)
        update, ridge, error = best_update(moments, here.options.ridges)
        if update is not None:
            before = out.copies()
            out.move(update)
            if out.gain is not None:
                # Behind a post-norm the moments promise what holds for small updates: see what this one does.
                judges = [part for part, held in here.context.batches.parts if held]
                apart = (missing(part) * weights[part, :, None].to(device) for part in judges)
                error = total(sum(each.square().sum().item() for each in apart)) / moments.judges.square
                if not error < 1:
                    out.restore(before)
                    ridge, error = None, 1.0
    here.note(out.name, ridge, error)
