"""Norm: the norm that ends a layer is given the gain and shift that bring each channel nearest to the parent's.

Where layers went, the parent's span ends in another layer's norm; where trees came, some channels are surer than
others. With z a channel of the normed sum and p the parent's stream behind the span, over n tokens:

    gain = (n sum(z p) - sum(z) sum(p)) / (n sum(z z) - sum(z)^2),  shift = (sum(p) - gain sum(z)) / n
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llmsurgeon.healing.refit.context import LayerFit
from llmsurgeon.processes.exchange import add_up


def ends_in_norm(here: LayerFit) -> bool:
    """True where a norm behind the residual sum ends a layer that was changed, or has trees."""
    return here.family.post_norm and (here.changed or here.has_trees)


def fit_norm(here: LayerFit) -> None:
    """Fit gain and shift on the tokens that fit, and keep them where they err less on those that judge."""
    norm: Any = here.module.get_submodule(here.family.ffn_norm)
    gain, shift = norm.weight.data, norm.bias.data
    sums = _sums(here, norm)
    n, z, zz, p, zp, _ = sums[0]
    new_gain = (n * zp - z * p) / (n * zz - z * z).clamp_min(torch.finfo(torch.float32).tiny)
    new_shift = (p - new_gain * z) / n

    def error(g: Tensor, s: Tensor) -> float:
        n, z, zz, p, zp, pp = sums[1]
        return float((pp - 2 * g * zp - 2 * s * p + g * g * zz + 2 * g * s * z + n * s * s).sum())

    ratio = error(new_gain, new_shift) / max(error(gain.double().cpu(), shift.double().cpu()), 1e-30)
    accepted = ratio < 1
    here.note(here.family.ffn_norm, 0.0 if accepted else None, min(ratio, 1.0))
    if accepted:
        gain.copy_(new_gain.to(gain))
        shift.copy_(new_shift.to(shift))


def _sums(here: LayerFit, norm: Any) -> Tensor:
    """Per channel, of tokens that fit and that judge: sums of 1, z, z z, p, z p, p p, [2, 6, D] in float64."""
    stream, text = here.behind_attention(), here.context.batches
    seen: list[Tensor] = []
    hook = norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    shape = norm.weight.shape
    sums = torch.zeros(2, 6, *shape, dtype=torch.float64)
    for part, held in text.parts:
        here.student.feed_forward(here.index, stream[part].to(here.student.device))
        z = text.rows(part, F.layer_norm(seen.pop().float(), shape, eps=norm.eps))
        p = text.rows(part, here.parent[part].to(z.device).float())
        terms = (torch.ones_like(z), z, z * z, p, z * p, p * p)
        sums[int(held)] += torch.stack([term.sum(0) for term in terms]).double().cpu()
    hook.remove()
    add_up(sums)
    return sums
