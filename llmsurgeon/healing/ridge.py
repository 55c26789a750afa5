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
    index 1 judges.
    """

    gram: list[Tensor] = field(default_factory=list)
    cross: list[Tensor] = field(default_factory=list)
    square: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def add(self, features: Tensor, residual: Tensor, held_out: bool) -> None:
        """Add tokens: features [n, F], residual [n, O]."""
        if not self.gram:
            f, o = features.shape[-1], residual.shape[-1]
            self.gram = [features.new_zeros(f, f, dtype=torch.float32) for _ in range(2)]
            self.cross = [features.new_zeros(f, o, dtype=torch.float32) for _ in range(2)]
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
        """Mirror the Gram matrices once everything is added."""
        for gram in self.gram:
            gram.copy_(gram.triu() + gram.triu(1).T)
        return self

    def held_out_error(self, update: Tensor) -> float:
        """Squared error on the held-out tokens after adding `update` [F, O], relative to before."""
        before = self.square[1]
        change = (update * (self.gram[1] @ update)).sum() - 2 * (update * self.cross[1]).sum()
        return (before + change.item()) / before if before > 0 else 1.0


def ridge_solution(gram: Tensor, cross: Tensor, ridge: float, groups: Sequence[int] = ()) -> Tensor:
    """argmin_X ||A X - R||^2 + ridge * mean(diag(A^T A)) ||X||^2, from A^T A [F, F] and A^T R [F, O]. [F, O].

    groups: sizes of feature groups that differ in scale; each is damped by its own mean.
    """
    damped = gram.clone()
    for diagonal in damped.diagonal().split(list(groups) or len(gram)):
        diagonal.add_(ridge * diagonal.mean().clamp_min(torch.finfo(torch.float32).tiny))
    factor, info = torch.linalg.cholesky_ex(damped)
    if info.item():
        # Rounding in the float32 sums can outweigh a small ridge and push eigenvalues below zero: raise them to it.
        values, vectors = torch.linalg.eigh(damped.double())
        rounding = values[-1] * torch.finfo(torch.float32).eps
        return (vectors @ ((vectors.T @ cross.double()) / values.clamp_min(rounding)[:, None])).float()
    return torch.cholesky_solve(cross, factor)


def best_update(moments: Moments, ridges: Sequence[float]) -> tuple[Tensor | None, float | None, float]:
    """(update [F, O], ridge, held-out error relative to before); no update where none lowers that error.

    The held-out tokens choose the ridge and enter no fit: what is measured on them afterwards is of unseen text.
    """

    def solved(ridge: float) -> Tensor:
        return ridge_solution(moments.gram[0], moments.cross[0], ridge)

    errors = {ridge: moments.held_out_error(solved(ridge)) for ridge in ridges}
    ridge = min(errors, key=lambda r: errors[r])
    return (solved(ridge), ridge, errors[ridge]) if errors[ridge] < 1 else (None, None, 1.0)


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
