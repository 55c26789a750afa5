"""Products of packed ternary weights with single vectors on CPUs, compiled by numba (pip install llmsurgeon[cpu]).

The weights stay packed: four codes are taken out of each byte as it comes by, so a product reads 2 bits a weight.
Shapes: I inputs, R rows of bytes, each of which holds four rows of codes: r, r + R, r + 2 R, r + 3 R.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import get_num_threads, njit, prange, set_num_threads, types
from numba.extending import intrinsic

# Sums may be reordered, or they could not run in vector registers.
FAST = {"reassoc", "contract", "nsz"}
# Bytes from which threads are worth waking.
THREADED_FROM = 1 << 18


def _two_bits(builder: Any, byte: Any, place: Any, bits: int) -> Any:
    """IR for the two bits of a byte at 2 * place, as an integer of so many bits."""
    width = ir.IntType(bits)
    shift = builder.shl(builder.trunc(place, width), width(1))
    return builder.and_(builder.lshr(builder.zext(byte, width), shift), width(3))


# As IR: numba's own operators widen all integers to 64 bits, and half or a quarter as many fit a register.
@intrinsic
def _code(typing: Any, byte: Any, place: Any) -> Any:
    """The code + 1 at a place of a byte, float32."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.sitofp(_two_bits(builder, *arguments, 32), ir.FloatType())

    return types.float32(types.uint8, types.int64), build


@intrinsic
def _bfloat16(typing: Any, byte: Any, place: Any, size: Any) -> Any:
    """The bits of code * size in bfloat16, int16, from those of a size that is not negative."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, place, size = arguments
        width = ir.IntType(16)
        two = _two_bits(builder, byte, place, 16)
        # 0 stands for -size, 1 for 0, 2 for size: the lower bit says zero, the upper one that there is no sign.
        positive = builder.shl(builder.and_(two, width(2)), width(14))
        signed = builder.or_(size, builder.xor(positive, width(0x8000)))
        return builder.and_(signed, builder.sub(builder.and_(two, width(1)), width(1)))

    return types.int16(types.uint8, types.int64, types.int16), build


@njit(fastmath=FAST)
def _row(x: Any, bits: Any, r: Any, total: Any, out: Any) -> None:
    a = b = c = d = np.float32(0)
    for i in range(x.shape[0]):
        four, value = bits[r, i], x[i]
        a += value * _code(four, 0)
        b += value * _code(four, 1)
        c += value * _code(four, 2)
        d += value * _code(four, 3)
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
def _float_row(bits: Any, r: Any, sizes: Any, out: Any) -> None:
    for place in range(4):
        size = sizes[place, r]
        for i in range(bits.shape[1]):
            out[place, r, i] = _code(bits[r, i], place) * size - size


@njit
def _bfloat16_row(bits: Any, r: Any, sizes: Any, out: Any) -> None:
    for place in range(4):
        size = sizes[place, r]
        for i in range(bits.shape[1]):
            out[place, r, i] = _bfloat16(bits[r, i], place, size)


def _over_rows(row: Any) -> tuple[Any, Any]:
    """The loop over rows, on one thread and on several."""

    @njit
    def alone(bits: Any, sizes: Any, out: Any) -> None:
        for r in range(bits.shape[0]):
            row(bits, r, sizes, out)

    @njit(parallel=True)
    def together(bits: Any, sizes: Any, out: Any) -> None:
        for r in prange(bits.shape[0]):
            row(bits, r, sizes, out)

    return alone, together


_UNPACK = {4: _over_rows(_float_row), 2: _over_rows(_bfloat16_row)}


def unpack(bits: np.ndarray, sizes: np.ndarray, out: np.ndarray, threads: int) -> None:
    """Write weights to `out` [4, R, I] from their codes, bits uint8 [R, I], and the scales of their rows, sizes [4, R].

    Scales and weights are float32, or int16 that is read as bfloat16.
    """
    alone, together = _UNPACK[out.itemsize]
    if threads == 1 or bits.size < THREADED_FROM // 4:
        alone(bits, sizes, out)
        return
    before = get_num_threads()
    set_num_threads(min(threads, before))
    try:
        together(bits, sizes, out)
    finally:
        set_num_threads(before)
