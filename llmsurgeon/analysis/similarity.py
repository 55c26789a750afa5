"""The pure maths of the scores: tensors in, tensors out.

Shapes: S sequences, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# Logits that are compared at a time: on a CPU in float32 they stay in the cache of a core.
COMPARED_ON_CPU, COMPARED_ELSEWHERE = 1 << 17, 1 << 26


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """cos(a, b) over the last dimension, in float32; 0 where a vector is zero. [..., D] -> [...]."""
    a, b = a.float(), b.float()
    norms = a.norm(dim=-1) * b.norm(dim=-1)
    return (a * b).sum(-1) / norms.clamp_min(torch.finfo(torch.float32).tiny)


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cos(a, b) in [0, 2]. [..., D] -> [...]."""
    return 1 - cosine(a, b)


class KLFrom:
    """KL(parent || model) in nats for many models of one parent, whose side of it is computed once.

    Called with logits [t, V], t <= T, it gives float32 [t] for the parent's first t rows.
    """

    def __init__(self, parent_TV: Tensor) -> None:
        self.log_p = F.log_softmax(parent_TV.float(), -1)
        self.p = self.log_p.exp()

    def __call__(self, model_TV: Tensor) -> Tensor:
        numbers = COMPARED_ON_CPU if model_TV.device.type == "cpu" else COMPARED_ELSEWHERE
        chunk, result = max(1, numbers // model_TV.shape[-1]), []
        for start in range(0, len(model_TV), chunk):
            log_q = F.log_softmax(model_TV[start : start + chunk].float(), -1)
            rows = slice(start, start + len(log_q))
            result.append(log_q.neg_().add_(self.log_p[rows]).mul_(self.p[rows]).sum(-1))
        return torch.cat(result)


def angular_distance(a: Tensor, b: Tensor) -> Tensor:
    """arccos(cos(a, b)) / pi in [0, 1] (arXiv 2403.17887, eq. 2). [..., D] -> [...]."""
    return cosine(a, b).clamp(-1, 1).arccos() / math.pi
