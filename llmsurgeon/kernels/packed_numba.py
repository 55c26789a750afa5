"""Products of packed ternary weights with a few vectors on CPUs, compiled by numba (pip install llmsurgeon[cpu]).

The weights stay packed: four codes are taken out of each byte as it comes by, so a product reads 2 bits a weight.
Shapes: I inputs, R rows of bytes, each of which holds four rows of codes: r, r + R, r + 2 R, r + 3 R.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
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
def _code_of(typing: Any, byte: Any, place: Any) -> Any:
    """The code + 1 at a place of a byte, float32."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, place = arguments
        return builder.sitofp(_two_bits(builder, byte, place, 32), ir.FloatType())

    return types.float32(types.uint8, types.int64), build


def _bfloat16_of(typing: Any, byte: Any, place: Any, size: Any) -> Any:
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


_code: Any = intrinsic(_code_of)
_bfloat16: Any = intrinsic(_bfloat16_of)


@njit(fastmath=FAST)
def _one(x: Any, bits: Any, r: Any, t: Any, out: Any) -> None:
    """Four outputs of one token: sums over codes + 1."""
    a = b = c = d = np.float32(0)
    token = x[t]
    for i in range(x.shape[1]):
        four, value = bits[r, i], token[i]
        a += value * _code(four, 0)
        b += value * _code(four, 1)
        c += value * _code(four, 2)
        d += value * _code(four, 3)
    out[t, 0, r], out[t, 1, r], out[t, 2, r], out[t, 3, r] = a, b, c, d


@njit(fastmath=FAST)
def _four(x: Any, bits: Any, r: Any, t: Any, out: Any) -> None:
    """Four outputs of each of four tokens: codes are taken out of their bytes once, and all sums stay in registers."""
    a = b = c = d = e = f = g = h = np.float32(0)
    j = k = m = n = o = p = q = s = np.float32(0)
    first, second, third, last = x[t], x[t + 1], x[t + 2], x[t + 3]
    for i in range(x.shape[1]):
        four = bits[r, i]
        one, two, three, more = _code(four, 0), _code(four, 1), _code(four, 2), _code(four, 3)
        u, v, w, z = first[i], second[i], third[i], last[i]
        a, b, c, d = a + one * u, b + two * u, c + three * u, d + more * u
        e, f, g, h = e + one * v, f + two * v, g + three * v, h + more * v
        j, k, m, n = j + one * w, k + two * w, m + three * w, n + more * w
        o, p, q, s = o + one * z, p + two * z, q + three * z, s + more * z
    out[t, 0, r], out[t, 1, r], out[t, 2, r], out[t, 3, r] = a, b, c, d
    out[t + 1, 0, r], out[t + 1, 1, r], out[t + 1, 2, r], out[t + 1, 3, r] = e, f, g, h
    out[t + 2, 0, r], out[t + 2, 1, r], out[t + 2, 2, r], out[t + 2, 3, r] = j, k, m, n
    out[t + 3, 0, r], out[t + 3, 1, r], out[t + 3, 2, r], out[t + 3, 3, r] = o, p, q, s


@njit
def _product_row(bits: Any, r: Any, x: Any, out: Any) -> None:
    tokens = x.shape[0]
    for t in range(0, tokens - 3, 4):
        _four(x, bits, r, t, out)
    for t in range(tokens - tokens % 4, tokens):
        _one(x, bits, r, t, out)


@contextmanager
def _threads(wanted: int) -> Iterator[None]:
    # numba's first threads set the number of OpenMP threads of the whole process, torch's among them.
    torchs = torch.get_num_threads()
    before = get_num_threads()
    set_num_threads(min(wanted, before))
    try:
        yield
    finally:
        set_num_threads(before)
        torch.set_num_threads(torchs)


def _over_rows(row: Any) -> tuple[Any, Any]:
    """The loop over rows, on one thread and on several."""

    @njit
    def alone(bits: Any, given: Any, out: Any) -> None:
        for r in range(bits.shape[0]):
            row(bits, r, given, out)

    @njit(parallel=True)
    def together(bits: Any, given: Any, out: Any) -> None:
        for r in prange(bits.shape[0]):
            row(bits, r, given, out)

    return alone, together


def _run(loops: tuple[Any, Any], bits: np.ndarray, given: np.ndarray, out: np.ndarray, threads: int) -> None:
    """One of the two loops that `_over_rows` made: a few rows are not worth waking threads for."""
    alone, together = loops
    if threads == 1 or bits.size < THREADED_FROM:
        alone(bits, given, out)
    else:
        with _threads(threads):
            together(bits, given, out)


_PRODUCT = _over_rows(_product_row)


def product(x: np.ndarray, bits: np.ndarray, threads: int) -> np.ndarray:
    """x float32 [n, I] times the codes in bits uint8 [R, I]: float32 [n, 4 R]."""
    out = np.empty((len(x), 4, len(bits)), np.float32)
    _run(_PRODUCT, bits, x, out, threads)
    # Stored is code + 1.
    out -= x.sum(axis=1)[:, None, None]
    return out.reshape(len(x), -1)


@njit
def _float_row(bits: Any, r: Any, sizes: Any, out: Any) -> None:
    a, b, c, d = sizes[0, r], sizes[1, r], sizes[2, r], sizes[3, r]
    for i in range(bits.shape[1]):
        four = bits[r, i]
        out[0, r, i] = _code(four, 0) * a - a
        out[1, r, i] = _code(four, 1) * b - b
        out[2, r, i] = _code(four, 2) * c - c
        out[3, r, i] = _code(four, 3) * d - d


@njit
def _bfloat16_row(bits: Any, r: Any, sizes: Any, out: Any) -> None:
    a, b, c, d = sizes[0, r], sizes[1, r], sizes[2, r], sizes[3, r]
    for i in range(bits.shape[1]):
        four = bits[r, i]
        out[0, r, i] = _bfloat16(four, 0, a)
        out[1, r, i] = _bfloat16(four, 1, b)
        out[2, r, i] = _bfloat16(four, 2, c)
        out[3, r, i] = _bfloat16(four, 3, d)


_UNPACK = {4: _over_rows(_float_row), 2: _over_rows(_bfloat16_row)}


def unpack(bits: np.ndarray, sizes: np.ndarray, out: np.ndarray, threads: int) -> None:
    """Write weights to `out` [4, R, I] from their codes, bits uint8 [R, I], and the scales of their rows, sizes [4, R].

    Scales and weights are float32, or int16 that is read as bfloat16.
    """
    _run(_UNPACK[out.itemsize], bits, sizes, out, threads)
