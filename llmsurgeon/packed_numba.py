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


@njit
def _codes(bits: Any, r: Any, one: Any, sign: Any, out: Any) -> None:
    for i in range(bits.shape[1]):
        four = np.int32(bits[r, i])
        for place in range(4):
            code = ((four >> (2 * place)) & 3) - 1
            # All bits of -1 are set: the number's sign bit, and where it is not 0, those of 1.
            out[place, r, i] = (-(code & 1) & one) | (code & sign)


@njit
def _unpack_alone(bits: Any, one: Any, sign: Any, out: Any) -> None:
    for r in range(bits.shape[0]):
        _codes(bits, r, one, sign, out)


@njit(parallel=True)
def _unpack_together(bits: Any, one: Any, sign: Any, out: Any) -> None:
    for r in prange(bits.shape[0]):
        _codes(bits, r, one, sign, out)


# The bits of 1 and of the sign, in float32 and in bfloat16.
BITS = {4: (np.int32(0x3F800000), np.int32(-(2**31))), 2: (np.int32(0x3F80), np.int32(-(2**15)))}


def unpack(bits: np.ndarray, out: np.ndarray, threads: int) -> None:
    """Write the codes of bits uint8 [R, I] as floats to `out` [4, R, I], int32 or int16 that are read as float32 or
    bfloat16."""
    one, sign = BITS[out.itemsize]
    if threads == 1 or bits.size < THREADED_FROM // 4:
        _unpack_alone(bits, one, sign, out)
        return
    before = get_num_threads()
    set_num_threads(min(threads, before))
    try:
        _unpack_together(bits, one, sign, out)
    finally:
        set_num_threads(before)
