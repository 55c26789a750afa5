"""Join: the attention that a changed layer keeps takes over what it can of the work of those that went.

Its output projection is regressed on what is missing to the parent's state P behind the span, next to the outputs of
the layer's FFNs, which are refitted on their own, later. With A what the projection reads, O_k what the FFN's rows of
parent k give, and X the student's stream behind the layer:

    W_o <- W_o + dW,  (dW, c) = argmin ||A dW^T + sum_k O_k c_k - (P - X)||^2 + ridge * (each group's own mean diagonal)

Shapes: n tokens, F = heads * head_dim, D model width: A [n, F]; O_k, X, P [n, D]; W_o [D, F]; c_k [D, D].
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from llmsurgeon.healing.refit.align import rows_of
from llmsurgeon.healing.refit.attention import lost_heads
from llmsurgeon.healing.refit.context import LayerFit, weights_in
from llmsurgeon.healing.refit.mixer import is_new as is_new_mixer
from llmsurgeon.healing.refit.projection import OutputProjection, attention_out, output_projection
from llmsurgeon.healing.refit.ridge import joint_update
from llmsurgeon.healing.refit.symmetric import units_of


def can_take_over(here: LayerFit) -> bool:
    """True where a changed layer has an attention whose output projection may move, and an FFN beside it.

    Not where heads went, for which those that are left make up first (attention.py). Not before trees: their decisions
    move with what they read, which attention may only bring nearer to the parent's.
    """
    if not here.options.join or not here.changed or here.family.post_norm or is_new_mixer(here) or lost_heads(here):
        return False
    both = here.spec.attention is not None and here.spec.ffn is not None and here.spec.ffn.as_family
    return both and not here.is_ternary(attention_out(here.family))


def take_over(here: LayerFit) -> None:
    """Move the attention's output projection towards what the whole span did in the parent, and take the student's
    stream behind it."""
    device, out = here.student.device, output_projection(here, "attention")
    # A mixture of experts has no one projection: its output counts as one group.
    down = None if here.family.experts else output_projection(here, "ffn")
    # Channels that no parent can be told to own count as one FFN.
    rows = [r for number in here.spec.parents if (r := rows_of(here, number))] or [slice(None)]
    groups: list[int] = []
    behind = torch.empty_like(here.entered)
    heads_read: list[Tensor] = []

    def batch(part: slice) -> tuple[Tensor, Tensor]:
        entered = here.entered[part].to(device)
        contribution = here.student.attend(here.index, entered)
        assert contribution is not None
        attended = entered + contribution
        ffn = here.student.feed_forward(here.index, entered if here.student.parallel_residual else attended)
        assert ffn is not None
        behind[part] = attended.cpu()
        heads_read.append(out.read.cpu())
        outputs = [out.features(), *_ffn_outputs(down, rows, ffn)]
        groups[:] = [output.shape[1] for output in outputs]
        return torch.cat(outputs, dim=1), here.parent[part].to(device).float() - attended.float() - ffn.float()

    with out, down or nullcontext():
        moments = here.moments(batch, weights_in(here.parent))
    update, error = joint_update(moments, here.options.join_ridge, groups)
    here.note(out.name, None if update is None else here.options.join_ridge, error)
    if update is not None:
        out.move(update)
        # Only the projection moved: no second pass through attention. Bit for bit what a resumed run computes.
        for (part, _), heads in zip(here.context.batches.parts, heads_read, strict=True):
            behind[part] = (here.entered[part].to(device) + out.contribution(heads.to(device))).cpu()
    here.attended = behind


def _ffn_outputs(down: OutputProjection | None, rows: list[slice], ffn: Tensor) -> list[Tensor]:
    """What each parent's rows of an FFN add to the stream, [n, D] each; `ffn` where it is not a sum of that."""
    if down is None or down.gain is not None:
        return [ffn.float().flatten(0, 1)]
    inner, weight = down.read.flatten(0, 1), down.weight
    with units_of(inner.dtype):
        return [inner[:, r].float() @ weight[:, r].float().T * down.factor for r in rows]
