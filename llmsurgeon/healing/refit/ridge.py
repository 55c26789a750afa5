"""Ridge regression from sums over tokens: some fit, others are held out and judge.

Shapes: n tokens, F features, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmsurgeon.errors import SurgeryError

GRAM_COLUMNS = 512


@dataclass
class Moments:
    """Sums that ridge regression needs, in float32, for the tokens that fit and those held out.

    gram [F, F] = A^T A (the upper triangle until `complete`); cross [F, O] = A^T R; square = ||R||^2. Index 0 fits,
    index 1 judges; without tokens of its kind, one takes no room.
    """

    gram: list[Tensor] = field(default_factory=lambda: [torch.empty(0), torch.empty(0)])
    cross: list[Tensor] = field(default_factory=lambda: [torch.empty(0), torch.empty(0)])
    square: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def add(self, features: Tensor, residual: Tensor, held_out: bool) -> None:
        """Add tokens: features [n, F], residual [n, O]."""
        if not self.gram[held_out].numel():
            f, o = features.shape[-1], residual.shape[-1]
            self.gram[held_out] = features.new_zeros(f, f, dtype=torch.float32)
            self.cross[held_out] = features.new_zeros(f, o, dtype=torch.float32)
        a, r = features.float(), residual.float()
        for start in range(0, a.shape[1], GRAM_COLUMNS):
            # The Gram matrix is symmetric: only blocks on and above the diagonal are computed.
            columns = a[:, start : start + GRAM_COLUMNS]
            self.gram[held_out][start : start + GRAM_COLUMNS, start:].addmm_(columns.T, a[:, start:])
        self.cross[held_out].addmm_(a.T, r)
        square = r.square().sum().item()
        if not math.isfinite(square):
            raise SurgeryError(
                "refit: hidden states are not finite; run `llmsurgeon verify` on the source, and if it is sound, "
                "calibrate in a wider dtype (--dtype float32)"
            )
        self.square[held_out] += square

    def complete(self) -> Moments:
        """Mirror the Gram matrices once everything is added, a block at a time and in place."""
        for gram in self.gram:
            mirror(gram)
        return self

    def held_out_error(self, update: Tensor) -> float:
        """Squared error on the held-out tokens after adding `update` [F, O], relative to before."""
        before, change = self.square[1], 0.0
        if before <= 0:
            return 1.0
        for start in range(0, len(update), GRAM_COLUMNS):
            rows = slice(start, start + GRAM_COLUMNS)
            moved = update[rows]
            change += (moved * (self.gram[1][rows] @ update - 2 * self.cross[1][rows])).sum().item()
        return (before + change) / before


def mirror(matrix: Tensor) -> None:
    """Copy what is above the diagonal of a square matrix below it, in place."""
    for start in range(0, len(matrix), GRAM_COLUMNS):
        stop = start + GRAM_COLUMNS
        square = matrix[start:stop, start:stop]
        square.copy_(square.triu() + square.triu(1).T)
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T


def factor_below(matrix: Tensor) -> bool:
    """Cholesky factorisation of a symmetric matrix [F, F]: the lower triangle becomes the factor, in place.

    What is above the diagonal stays, so that `mirror` brings the matrix back once its diagonal is restored. Returns
    False where the matrix is not positive definite to the precision of its numbers (it is then in part a factor).
    """
    size = len(matrix)
    for start in range(0, size, GRAM_COLUMNS):
        stop = min(start + GRAM_COLUMNS, size)
        square = matrix[start:stop, start:stop]
        # Reads the lower triangle alone.
        factor, info = torch.linalg.cholesky_ex(square)
        if info.item():
            return False
        square.copy_(factor + square.triu(1))
        if stop == size:
            break
        panel = matrix[stop:, start:stop]
        panel.copy_(torch.linalg.solve_triangular(factor.T, panel, upper=True, left=False))
        for below in range(stop, size, GRAM_COLUMNS):
            # What is on and below the diagonal of the rest, a block of columns at a time.
            columns = slice(below, min(below + GRAM_COLUMNS, size))
            own = matrix[columns, start:stop]
            rest = matrix[columns.stop :, columns]
            rest.addmm_(matrix[columns.stop :, start:stop], own.T, alpha=-1)
            corner = matrix[columns, columns]
            corner.copy_((corner - own @ own.T).tril() + corner.triu(1))
    return True


def ridge_solution(gram: Tensor, cross: Tensor, ridge: float, groups: Sequence[int] = ()) -> Tensor:
    """argmin_X ||A X - R||^2 + ridge * mean(diag(A^T A)) ||X||^2, from A^T A [F, F] and A^T R [F, O]. [F, O].

    The Gram matrix is worked on in place, as it may be the largest thing in memory, and is again what it was in the
    end. groups: sizes of feature groups that differ in scale; each is damped by its own mean.
    """
    kept = gram.diagonal().clone()
    damped = kept.clone()
    for diagonal in damped.split(list(groups) or len(gram)):
        diagonal.add_(ridge * diagonal.mean().clamp_min(torch.finfo(torch.float32).tiny))
    try:
        gram.diagonal().copy_(damped)
        if factor_below(gram):
            half = torch.linalg.solve_triangular(gram, cross, upper=False)
            # Above the diagonal stands what the matrix was: the factor's transpose is read from below it.
            return torch.linalg.solve_triangular(gram.T, half, upper=True)
    finally:
        restore(gram, kept)
    # Rounding in the float32 sums can outweigh a small ridge and push eigenvalues below zero: raise them to it.
    wide = gram.double()
    wide.diagonal().copy_(damped)
    values, vectors = torch.linalg.eigh(wide)
    rounding = values[-1] * torch.finfo(torch.float32).eps
    return (vectors @ ((vectors.T @ cross.double()) / values.clamp_min(rounding)[:, None])).float()


def restore(matrix: Tensor, diagonal: Tensor) -> None:
    """Undo `factor_below` on a matrix with this diagonal."""
    matrix.diagonal().copy_(diagonal)
    mirror(matrix)


def best_update(moments: Moments, ridges: Sequence[float]) -> tuple[Tensor | None, float | None, float]:
    """(update [F, O], ridge, held-out error relative to before); no update where none lowers that error.

    The held-out tokens choose the ridge and enter no fit: what is measured on them afterwards is of unseen text.
    """
    best: tuple[Tensor | None, float | None, float] = (None, None, 1.0)
    for ridge in ridges:
        update = ridge_solution(moments.gram[0], moments.cross[0], ridge)
        error = moments.held_out_error(update)
        if error < best[2]:
            best = update, ridge, error
    return best


def joint_update(moments: Moments, ridge: float, groups: Sequence[int]) -> tuple[Tensor | None, float]:
    """(the first group's part of the joint update [groups[0], O], held-out error relative to leaving that group out).

    No update where the first group does not lower the held-out error.
    """
    own = groups[0]
    joint = ridge_solution(moments.gram[0], moments.cross[0], ridge, groups)
    others = torch.zeros_like(joint)
    others[own:] = ridge_solution(moments.gram[0][own:, own:], moments.cross[0][own:], ridge, groups[1:])
    error = moments.held_out_error(joint) / moments.held_out_error(others)
    return (joint[:own], error) if error < 1 else (None, 1.0)
