"""Which GGUF type holds a ternary tensor exactly, and the one block that the `gguf` package would round.

TQ1_0 (54 bytes) and TQ2_0 (66 bytes) keep 256 codes and a float16 scale. Rows that are no whole blocks of 256, or whose
scale changes within one, go to Q4_0: 18 bytes for 32 numbers q * d with q = -8 .. 7, exact with q = -1, 0, 1. The
package chooses d = largest / -8, which cannot hold both signs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

TQ_BLOCK, Q4_BLOCK = 256, 32
ROWS_AT_ONCE = 4096


def exact_kind(weight_OI: Tensor, wanted: GGMLQuantizationType) -> GGMLQuantizationType | None:
    """The type of fewest bits that holds each number: `wanted` (a TQ type), Q4_0, or None where neither does."""
    from gguf import GGMLQuantizationType as Kind

    for kind, block in ((wanted, TQ_BLOCK), (Kind.Q4_0, Q4_BLOCK)):
        if _holds(weight_OI, block):
            return kind
    return None


def _holds(weight_OI: Tensor, block: int) -> bool:
    """True where each `block` neighbours have one magnitude beside zero, which float16 holds, and some are not zero."""
    if weight_OI.dim() != 2 or weight_OI.shape[1] % block:
        return False
    some = False
    for rows in (weight_OI[:4], *weight_OI.split(ROWS_AT_ONCE)):  # most tensors are told by a few rows
        sizes = rows.detach().float().abs().reshape(-1, block)
        scale = sizes.amax(-1, keepdim=True)
        if not bool(((sizes == 0) | (sizes == scale)).all() and (scale.to(torch.float16).float() == scale).all()):
            return False
        some = some or bool((scale > 0).any())
    return some


def ternary_q4_0(numbers: np.ndarray) -> np.ndarray:
    """Rows [n, I] of ternary blocks as Q4_0: uint8 [n, I / 32 * 18], a float16 scale and 32 codes + 8 in each block."""
    blocks = numbers.reshape(-1, Q4_BLOCK)
    scale = np.abs(blocks).max(axis=1, keepdims=True).astype(np.float16)
    codes = (np.sign(blocks) + 8).astype(np.uint8)
    halves = codes[:, : Q4_BLOCK // 2] | codes[:, Q4_BLOCK // 2 :] << 4
    return np.concatenate([scale.view(np.uint8), halves], axis=1).reshape(len(numbers), -1)
