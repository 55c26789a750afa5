"""Products of packed ternary weights with single vectors on CPUs, compiled by numba (pip install llmsurgeon[cpu]).

The weights stay packed: four codes are taken out of each byte as it comes by, so a product reads 2 bits a weight.
Shapes: I inputs, R rows of bytes, each of which holds four rows of codes: r, r + R, r + 2 R, r + 3 R.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import get_num_threads, njit, prange, set_num_threads

# Sums may be reordered, or they could not run in vector registers.
FAST = {"reassoc", "contract", "nsz"}
# Bytes from which threads are worth waking.
THREADED_FROM = 1 << 18


@njit(fastmath=FAST)
def _row(x: Any, bits: Any, r: Any, total: Any, out: Any) -> None:
    a = b = c = d = np.float32(0)
    for i in range(x.shape[0]):
        four, value = np.int32(bits[r, i]), x[i]
        a += value * np.float32(four & 3)
        b += value * np.float32((four >> 2) & 3)
        c += value * np.float32((four >> 4) & 3)
        d += value * np.float32(four >> 6)
    # Stored is code + 1.
    out[0, r], out[1, r], out[2, r], out[3, r] = a - total, b - total, c - total, d - total


@njit(fastmath=FAST)
def _alone(x: Any, bits: Any, out: Any) -> None:
    total = x.sum()
    for r in range(bits.shape[0]):
        _row(x, bits, r, total, out)


@njit(fastmath=FAST, parallel=True)
def _together(x: Any, bits: Any, out: Any) -> None:
    total = x.sum()
    for r in prange(bits.shape[0]):
        _row(x, bits, r, total, out)


def product(x: np.ndarray, bits: np.ndarray, threads: int) -> np.ndarray:
    """codes @ x, float32 [4 R], from x float32 [I] and bits uint8 [R, I]."""
    out = np.empty((4, len(bits)), np.float32)
    if threads == 1 or bits.size < THREADED_FROM:
        _alone(x, bits, out)
        return out.reshape(-1)
    before = get_num_threads()
    set_num_threads(min(threads, before))
    try:
        _together(x, bits, out)
    finally:
        set_num_threads(before)
    return out.reshape(-1)


@njit(fastmath=FAST)
def _codes(bits: Any, out: Any) -> None:
    for r in range(bits.shape[0]):
        for i in range(bits.shape[1]):
            four = np.int32(bits[r, i])
            out[0, r, i] = np.float32(four & 3) - np.float32(1)
            out[1, r, i] = np.float32((four >> 2) & 3) - np.float32(1)
            out[2, r, i] = np.float32((four >> 4) & 3) - np.float32(1)
            out[3, r, i] = np.float32(four >> 6) - np.float32(1)


def unpacked(bits: np.ndarray) -> np.ndarray:
    """The codes, float32 [4 R, I], from bits uint8 [R, I], in one pass."""
    out = np.empty((4, *bits.shape), np.float32)
    _codes(bits, out)
    return out.reshape(-1, bits.shape[1])
