"""Ridge regression over tokens: some fit, others are held out and judge.

What is kept of the tokens is what is smaller: sums over them, or they themselves where they are fewer than the features
(`operations/fit_memory.py` draws the line). From sums an update is (A^T A + D)^-1 A^T R; from the tokens it is the same
in the dual, A^T (A A^T + d)^-1 R, where a matrix of the tokens' number is factored and none of the features'.

Shapes: n tokens, F features, O outputs: features A [n, F]; what is missing R [n, O].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from llmsurgeon.errors import SurgeryError
from llmsurgeon.healing.refit.symmetric import COLUMNS, ROWS, add_gram, damped_solution, mirror, square_zeros
from llmsurgeon.operations.fit_memory import fits_in_dual, judges_as_rows
from llmsurgeon.processes.exchange import add_up, total
from llmsurgeon.processes.first import from_first, tensor_of_first
from llmsurgeon.processes.share import gather_rows
from llmsurgeon.processes.world import count, first


class Kept(Protocol):
    """What is kept of tokens of one kind, those that fit or those that judge."""

    square: float

    def add(self, features: Tensor, missing: Tensor) -> None:
        """Add tokens: features [n, F], what is missing [n, O]."""

    def meet(self) -> None:
        """Add the tokens of the other processes."""

    def complete(self) -> None:
        """Everything was added."""

    def update(self, ridge: float) -> Tensor:
        """argmin_X ||A X - R||^2 + ridge * mean(diag(A^T A)) ||X||^2, [F, O]."""

    def error(self, update: Tensor) -> float:
        """||A X - R||^2 for an update X [F, O]."""

    def sums(self) -> Sums:
        """The same tokens, summed."""


@dataclass
class Sums:
    """Sums over tokens, float32: gram [F, F] = A^T A (the upper triangle until `complete`); cross [F, O] = A^T R;
    square = ||R||^2. Before the first tokens they take no room."""

    gram: Tensor = field(default_factory=lambda: torch.empty(0))
    cross: Tensor = field(default_factory=lambda: torch.empty(0))
    square: float = 0.0

    def add(self, features: Tensor, missing: Tensor) -> None:
        self.square += square_of(missing)
        if not self.gram.numel():
            f, o = features.shape[-1], missing.shape[-1]
            self.gram = square_zeros(f, features)
            self.cross = features.new_zeros(f, o, dtype=torch.float32)
        add_gram(self.gram, features)
        for part, rest in zip(features.split(ROWS), missing.split(ROWS), strict=True):
            self.cross.addmm_(part.float().T, rest.float())

    def meet(self) -> None:
        add_up(self.gram, self.cross)
        self.square = total(self.square)

    def complete(self) -> None:
        mirror(self.gram)

    def update(self, ridge: float) -> Tensor:
        return ridge_solution(self.gram, self.cross, ridge)

    def error(self, update: Tensor) -> float:
        change = 0.0
        for start in range(0, len(update), COLUMNS):
            rows = slice(start, start + COLUMNS)
            change += (update[rows] * (self.gram[rows] @ update - 2 * self.cross[rows])).sum().item()
        return self.square + change

    def sums(self) -> Sums:
        return self


class Rows:
    """The tokens themselves, at most `tokens` of them: features in the dtype in which they come, R in float32."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.count, self.square = tokens, 0, 0.0
        self.features = self.missing = torch.empty(0)
        self._products: Tensor | None = None

    def add(self, features: Tensor, missing: Tensor) -> None:
        self.square += square_of(missing)
        if not self.count:
            self.features = features.new_empty(self.tokens, features.shape[-1])
            self.missing = missing.new_empty(self.tokens, missing.shape[-1], dtype=torch.float32)
        own = slice(self.count, self.count + len(features))
        self.features[own], self.missing[own] = features, missing
        self.count = own.stop

    def meet(self) -> None:
        self.square, own = total(self.square), self.count
        self.count = gather_rows(self.features, own)
        gather_rows(self.missing, own)

    def complete(self) -> None:
        # Padding is announced and does not come.
        self.features, self.missing = self.features[: self.count], self.missing[: self.count]

    def update(self, ridge: float) -> Tensor:
        if self._products is None:
            self._products = row_products(self.features)
        # The mean of F squared columns, from the sum of n squared rows.
        mean = self._products.diagonal().sum() / self.features.shape[1]
        weights = damped_solution(self._products, self.missing, (ridge * floored(mean)).expand(self.count))
        return torch.cat([columns.float().T @ weights for columns in self.features.split(COLUMNS, dim=1)])

    def error(self, update: Tensor) -> float:
        parts = zip(self.features.split(COLUMNS), self.missing.split(COLUMNS), strict=True)
        return sum((missing - features.float() @ update).square().sum().item() for features, missing in parts)

    def sums(self) -> Sums:
        found = Sums()
        found.add(self.features, self.missing)
        found.complete()
        return found


class Moments:
    """What ridge regression keeps of the tokens that fit and of those that judge.

    fitting, judging: how many of both will come, at the most; where nobody knows they are summed.
    """

    def __init__(self, fitting: int | None = None, judging: int | None = None) -> None:
        self.fitting, self.judging = fitting, judging
        self.fits: Kept = Sums()
        self.judges: Kept = Sums()
        self._begun: set[bool] = set()
        self.none = torch.empty(0), torch.empty(0)

    def add(self, features: Tensor, missing: Tensor, held_out: bool) -> None:
        """Add tokens: features [n, F], what is missing [n, O]; those held out judge.

        Raises:
            SurgeryError: what is missing is not finite.
        """
        if held_out not in self._begun:
            self._begun.add(held_out)
            self._begin(features.shape[-1], held_out)
            self.none = features[:0], missing[:0]
        (self.judges if held_out else self.fits).add(features, missing)

    def _begin(self, features: int, held_out: bool) -> None:
        if held_out and self.judging is not None and judges_as_rows(self.judging, features):
            self.judges = Rows(self.judging)
        if not held_out and self.fitting is not None and fits_in_dual(self.fitting, features):
            self.fits = Rows(self.fitting)

    def complete(self) -> Moments:
        """Everything was added."""
        if count() > 1:
            self._meet()
        self.fits.complete()
        self.judges.complete()
        return self

    def _meet(self) -> None:
        """Add the tokens of the other processes, each of which has some that fit."""
        if self.judging != 0 and True not in self._begun:
            self.add(*self.none, held_out=True)
        self.fits.meet()
        if True in self._begun:
            self.judges.meet()

    def held_out_error(self, update: Tensor) -> float:
        """Squared error on the held-out tokens after adding `update` [F, O], relative to before."""
        before = self.judges.square
        return self.judges.error(update) / before if before > 0 else 1.0


def square_of(missing: Tensor) -> float:
    """||R||^2.

    Raises:
        SurgeryError: it is not finite.
    """
    square: float = missing.float().square().sum().item()
    if not math.isfinite(square):
        raise SurgeryError(
            "refit: hidden states are not finite; run `llmsurgeon verify` on the source, and if it is sound, "
            "calibrate in a wider dtype (--dtype float32)"
        )
    return square


def row_products(features: Tensor) -> Tensor:
    """A A^T [n, n] in float32 from A [n, F]."""
    products = square_zeros(len(features), features)
    for columns in features.split(COLUMNS, dim=1):
        add_gram(products, columns.T)
    mirror(products)
    return products


def floored(mean: Tensor) -> Tensor:
    """A mean square that can be divided by."""
    return mean.clamp_min(torch.finfo(torch.float32).tiny)


def ridge_solution(gram: Tensor, cross: Tensor, ridge: float, groups: Sequence[int] = ()) -> Tensor:
    """argmin_X ||A X - R||^2 + ridge * mean(diag(A^T A)) ||X||^2, from A^T A [F, F] and A^T R [F, O]. [F, O].

    The Gram matrix is worked on in place, and is again what it was in the end. groups: sizes of feature groups that
    differ in scale; each is damped by its own mean.
    """
    diagonals = gram.diagonal().split(list(groups) or len(gram))
    damping = torch.cat([(ridge * floored(part.mean())).expand(len(part)) for part in diagonals])
    return damped_solution(gram, cross, damping)


def best_update(moments: Moments, ridges: Sequence[float]) -> tuple[Tensor | None, float | None, float]:
    """(update [F, O], ridge, held-out error relative to before); no update where none lowers that error.

    The held-out tokens choose the ridge and enter no fit: what is measured on them afterwards is of unseen text.
    """
    best: tuple[Tensor | None, float | None, float] = (None, None, 1.0)
    for ridge in ridges if first() else ():
        update = moments.fits.update(ridge)
        error = moments.held_out_error(update)
        if error < best[2]:
            best = update, ridge, error
    # All take what one has found: machines that differ may round it otherwise.
    return tensor_of_first(best[0], moments.none[0]), *from_first(lambda: best[1:])


def joint_update(moments: Moments, ridge: float, groups: Sequence[int]) -> tuple[Tensor | None, float]:
    """(the first group's part of the joint update [groups[0], O], held-out error relative to leaving that group out).

    No update where the first group does not lower the held-out error.
    """
    update, error = _joint_update(moments, ridge, groups) if first() else (None, 1.0)
    return tensor_of_first(update, moments.none[0]), from_first(lambda: error)


def _joint_update(moments: Moments, ridge: float, groups: Sequence[int]) -> tuple[Tensor | None, float]:
    own, sums = groups[0], moments.fits.sums()
    joint = ridge_solution(sums.gram, sums.cross, ridge, groups)
    others = torch.zeros_like(joint)
    others[own:] = ridge_solution(sums.gram[own:, own:], sums.cross[own:], ridge, groups[1:])
    error = moments.held_out_error(joint) / moments.held_out_error(others)
    return (joint[:own], error) if error < 1 else (None, 1.0)
