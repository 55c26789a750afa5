"""Large symmetric matrices in float32: summed, factored and solved with in place, a few columns at a time.

Such a matrix may be the largest thing in memory, so nothing here makes another of its size. What is above its diagonal
says all of it: the Cholesky factor is made below, and mirrored away in the end. n tokens, F features, O outputs.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Columns that are summed and mirrored at a time; factored at a time; brought up to date behind those at a time.
COLUMNS, FACTORED, UPDATED = 512, 512, 1024
# Rows of features that are in float32 at a time; bytes from which a matrix has pages of its own.
ROWS, OWN_PAGES = 2048, 1 << 26


def square_zeros(size: int, like: Tensor) -> Tensor:
    """A float32 matrix of zeros [size, size], on the device of `like`.

    On a CPU a large one has pages of its own, which the kernel gets back with it: other memory that is freed is kept
    (walk/memory.py), and would hold room for the widest matrix beside all that came in between.
    """
    bytes_ = 4 * size**2
    if like.device.type != "cpu" or bytes_ < OWN_PAGES:
        return like.new_zeros(size, size, dtype=torch.float32)
    return torch.frombuffer(mmap.mmap(-1, bytes_), dtype=torch.float32).view(size, size)


def add_gram(gram: Tensor, features: Tensor) -> None:
    """gram += A^T A in float32, on and above the diagonal. features: A [n, F].

    Products of bfloat16 numbers are exact in float32, so where features are bfloat16 the units for it may compute them,
    at several times the rate.
    """
    with units_of(features.dtype):
        for wide in (rows.float() for rows in features.split(ROWS)):
            for start in range(0, len(gram), COLUMNS):
                columns = wide[:, start : start + COLUMNS]
                gram[start : start + COLUMNS, start:].addmm_(columns.T, wide[:, start:])


@contextmanager
def units_of(dtype: torch.dtype) -> Iterator[None]:
    """float32 products whose factors hold numbers of this dtype: summed in float32, by whatever multiplies exactly."""
    before = torch.get_float32_matmul_precision()
    if dtype == torch.bfloat16:
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def mirror(matrix: Tensor) -> None:
    """Copy what is above the diagonal of a square matrix below it, in place."""
    for start in range(0, len(matrix), COLUMNS):
        stop = start + COLUMNS
        square = matrix[start:stop, start:stop]
        square.copy_(square.triu() + square.triu(1).T)
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T


def factor_below(matrix: Tensor) -> bool:
    """Cholesky factorisation of a symmetric matrix [F, F]: the lower triangle becomes the factor, in place.

    What is above the diagonal stays, so that `mirror` brings the matrix back once its diagonal is restored. Returns
    False where the matrix is not positive definite to the precision of its numbers (it is then in part a factor).
    """
    size = len(matrix)
    for start in range(0, size, FACTORED):
        stop = min(start + FACTORED, size)
        square = matrix[start:stop, start:stop]
        # Reads the lower triangle alone.
        factor, info = torch.linalg.cholesky_ex(square)
        if info.item():
            return False
        put_below(square, factor)
        for first in range(stop, size, UPDATED):
            panel = matrix[first : first + UPDATED, start:stop]
            panel.copy_(torch.linalg.solve_triangular(factor, panel.T, upper=False).T)
        for first in range(stop, size, UPDATED):
            # What is on and below the diagonal of the rest, a block of columns at a time.
            columns = slice(first, min(first + UPDATED, size))
            own, below = matrix[columns, start:stop], slice(columns.stop, size)
            matrix[below, columns].addmm_(matrix[below, start:stop], own.T, alpha=-1)
            corner = matrix[columns, columns]
            put_below(corner, torch.addmm(corner, own, own.T, alpha=-1))
    return True


def put_below(square: Tensor, other: Tensor) -> None:
    """Copy what is on and below the diagonal of `other` to `square`."""
    square.copy_(torch.where(torch.ones_like(square, dtype=torch.bool).tril_(), other, square))


def damped_solution(matrix: Tensor, sides: Tensor, damping: Tensor) -> Tensor:
    """(M + diag(damping))^-1 sides [F, O], of a positive semidefinite M [F, F] that is again what it was in the end."""
    kept = matrix.diagonal().clone()
    damped = kept + damping
    try:
        matrix.diagonal().copy_(damped)
        if factor_below(matrix):
            half = torch.linalg.solve_triangular(matrix, sides, upper=False)
            # Above the diagonal stands what the matrix was: the factor's transpose is read from below it.
            return torch.linalg.solve_triangular(matrix.T, half, upper=True)
    finally:
        matrix.diagonal().copy_(kept)
        mirror(matrix)
    # Rounding in the float32 sums can outweigh a small ridge and push eigenvalues below zero: raise them to it.
    wide = matrix.double()
    wide.diagonal().copy_(damped)
    values, vectors = torch.linalg.eigh(wide)
    rounding = values[-1] * torch.finfo(torch.float32).eps
    return (vectors @ ((vectors.T @ sides.double()) / values.clamp_min(rounding)[:, None])).float()
