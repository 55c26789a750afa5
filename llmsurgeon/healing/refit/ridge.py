"""Ridge regression over tokens: some fit, others are held out and judge.

What is kept of the tokens is what is smaller: sums over them, or they themselves where they are fewer than the features
(`operations/fit_memory.py` draws the line). From sums an update is (A^T A + D)^-1 A^T R; from the tokens it is the same
in the dual, A^T (A A^T + d)^-1 R, where a matrix of the tokens' number is factored and none of the features'.

Shapes: n tokens, F features, O outputs: features A [n, F]; what is missing R [n, O].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from llmsurgeon.errors import SurgeryError
from llmsurgeon.healing.refit.symmetric import COLUMNS, add_gram, damped_solution, mirror
from llmsurgeon.operations.fit_memory import fits_in_dual, judges_as_rows

# The kind of tokens whose kind nobody asks about.
TEXT = "text"


class Kept(Protocol):
    """What is kept of tokens of one kind, those that fit or those that judge."""

    square: float

    def add(self, features: Tensor, missing: Tensor, weight: float = 1.0) -> None:
        """Add tokens: features [n, F], what is missing [n, O]; each counts `weight` times."""

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

    def add(self, features: Tensor, missing: Tensor, weight: float = 1.0) -> None:
        self.square += weight * square_of(missing)
        if not self.gram.numel():
            f, o = features.shape[-1], missing.shape[-1]
            self.gram = features.new_zeros(f, f, dtype=torch.float32)
            self.cross = features.new_zeros(f, o, dtype=torch.float32)
        add_gram(self.gram, features, weight)
        self.cross.addmm_(features.float().T, missing.float(), alpha=weight)

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
        self.features = self.missing = self.weights = torch.empty(0)
        self._products: Tensor | None = None

    def add(self, features: Tensor, missing: Tensor, weight: float = 1.0) -> None:
        self.square += weight * square_of(missing)
        if not self.count:
            self.features = features.new_empty(self.tokens, features.shape[-1])
            self.missing = missing.new_empty(self.tokens, missing.shape[-1], dtype=torch.float32)
            self.weights = missing.new_empty(self.tokens, 1, dtype=torch.float32)
        own = slice(self.count, self.count + len(features))
        self.features[own], self.missing[own], self.weights[own] = features, missing, weight
        self.count = own.stop

    def complete(self) -> None:
        # Padding is announced and does not come.
        came = slice(self.count)
        self.features, self.missing, self.weights = self.features[came], self.missing[came], self.weights[came]

    def update(self, ridge: float) -> Tensor:
        roots = self.weights.sqrt()
        if self._products is None:
            self._products = row_products(self.features).mul_(roots).mul_(roots.T)
        # The mean of F squared columns, from the sum of n squared rows.
        mean = self._products.diagonal().sum() / self.features.shape[1]
        found = damped_solution(self._products, roots * self.missing, (ridge * floored(mean)).expand(self.count))
        return torch.cat([columns.float().T @ (roots * found) for columns in self.features.split(COLUMNS, dim=1)])

    def error(self, update: Tensor) -> float:
        parts = zip(*(each.split(COLUMNS) for each in (self.features, self.missing, self.weights)), strict=True)
        return sum((w * (r - a.float() @ update).square()).sum().item() for a, r, w in parts)

    def sums(self) -> Sums:
        found = Sums()
        for weight in self.weights.unique().tolist():
            own = (self.weights == weight)[:, 0]
            found.add(self.features[own], self.missing[own], weight)
        found.complete()
        return found


class Moments:
    """What ridge regression keeps of the tokens that fit, and of those that judge by their kinds.

    fitting: how many will fit, at the most; judging: of each kind of text, how many will judge. Where nobody knows they
    are summed.
    """

    def __init__(self, fitting: int | None = None, judging: Mapping[str, int] | None = None) -> None:
        self.fitting, self.judging = fitting, judging or {}
        self.fits: Kept = Sums()
        self.judges: dict[str, Kept] = {}
        self._begun = False

    def fit(self, features: Tensor, missing: Tensor, weight: float = 1.0) -> None:
        """Add tokens that fit: features [n, F], what is missing [n, O]; each counts `weight` times.

        Raises:
            SurgeryError: what is missing is not finite.
        """
        if not self._begun and self.fitting is not None and fits_in_dual(self.fitting, features.shape[-1]):
            self.fits = Rows(self.fitting)
        self._begun = True
        self.fits.add(features, missing, weight)

    def judge(self, features: Tensor, missing: Tensor, kind: str = TEXT) -> None:
        """Add tokens that judge, all of one kind: features [n, F], what is missing [n, O].

        Raises:
            SurgeryError: what is missing is not finite.
        """
        if kind not in self.judges:
            known = self.judging.get(kind)
            as_rows = known is not None and judges_as_rows(known, features.shape[-1])
            self.judges[kind] = Rows(known) if known is not None and as_rows else Sums()
        self.judges[kind].add(features, missing)

    def complete(self) -> Moments:
        """Everything was added."""
        for kept in (self.fits, *self.judges.values()):
            kept.complete()
        return self

    def held_out_errors(self, update: Tensor) -> list[tuple[float, float]]:
        """Of each kind the squared error on the tokens that judge: (before, after adding `update` [F, O])."""
        return [(kept.square, kept.error(update)) for kept in self.judges.values() if kept.square > 0]

    def held_out_error(self, update: Tensor) -> float:
        """Squared error on all held-out tokens after adding `update` [F, O], relative to before."""
        return pooled(self.held_out_errors(update))


def pooled(errors: Sequence[tuple[float, float]]) -> float:
    """The error of all kinds together, relative to before; errors as of `Moments.held_out_errors`."""
    return sum(after for _, after in errors) / sum(before for before, _ in errors) if errors else 1.0


def worst(errors: Sequence[tuple[float, float]]) -> float:
    """The error of the kind that gains least, relative to before."""
    return max((after / before for before, after in errors), default=1.0)


def mean(errors: Sequence[tuple[float, float]]) -> float:
    """The errors of the kinds relative to before, each as much as the others."""
    return sum(after / before for before, after in errors) / len(errors) if errors else 1.0


# How kinds of text judge an update together.
VERDICTS = {"pooled": pooled, "worst": worst, "mean": mean}


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
    products = features.new_zeros(len(features), len(features), dtype=torch.float32)
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


def best_update(
    moments: Moments, ridges: Sequence[float], verdict: str = "pooled"
) -> tuple[Tensor | None, float | None, float]:
    """(update [F, O], ridge, held-out error relative to before); no update where none lowers that error.

    The held-out tokens choose the ridge and enter no fit: what is measured on them afterwards is of unseen text.
    """
    best: tuple[Tensor | None, float | None, float] = (None, None, 1.0)
    for ridge in ridges:
        update = moments.fits.update(ridge)
        error = VERDICTS[verdict](moments.held_out_errors(update))
        if error < best[2]:
            best = update, ridge, error
    return best


def joint_update(moments: Moments, ridge: float, groups: Sequence[int]) -> tuple[Tensor | None, float]:
    """(the first group's part of the joint update [groups[0], O], held-out error relative to leaving that group out).

    No update where the first group does not lower the held-out error.
    """
    own, sums = groups[0], moments.fits.sums()
    joint = ridge_solution(sums.gram, sums.cross, ridge, groups)
    others = torch.zeros_like(joint)
    others[own:] = ridge_solution(sums.gram[own:, own:], sums.cross[own:], ridge, groups[1:])
    error = moments.held_out_error(joint) / moments.held_out_error(others)
    return (joint[:own], error) if error < 1 else (None, 1.0)
