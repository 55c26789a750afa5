"""The pure maths of the scores: tensors in, tensors out.

Shapes: S sequences, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """cos(a, b) over the last dimension, in float32; 0 where a vector is zero. [..., D] -> [...]."""
    a, b = a.float(), b.float()
    norms = a.norm(dim=-1) * b.norm(dim=-1)
    return (a * b).sum(-1) / norms.clamp_min(torch.finfo(torch.float32).tiny)


def angular_distance(a: Tensor, b: Tensor) -> Tensor:
    """arccos(cos(a, b)) / pi in [0, 1] (arXiv 2403.17887, eq. 2). [..., D] -> [...]."""
    return cosine(a, b).clamp(-1, 1).arccos() / math.pi
