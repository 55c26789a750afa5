"""One option for every layer, of least summed score, within every budget: an integer program, solved by HiGHS.

Puzzle (arXiv 2411.19146, section 4) states the choice of blocks as a grouped knapsack; diverse solutions follow by
forbidding more than a share of an earlier one's options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmsurgeon.boundary.streams import stdout_kept_clean
from llmsurgeon.processes.first import from_first

# Seconds that one program may take; a solution that is only near the best will do.
SECONDS = 20.0
GAP = 1e-4


@dataclass(frozen=True)
class Choice:
    """What the program knows of an option: the layers that it decides, its score, its cost for each target."""

    layers: tuple[int, ...]
    score: float
    costs: tuple[float, ...]


@dataclass(frozen=True)
class Program:
    """choices: of all layers; budgets: the most that the costs may add up to, for each target, the rest taken off."""

    layers: int
    choices: Sequence[Choice]
    budgets: tuple[float, ...]

    def best(self, apart_from: Sequence[Sequence[int]] = (), overlap: float = 1.0) -> list[int] | None:
        """Places of the choices of least summed score; None where nothing is within the budgets.

        Args:
            apart_from: earlier solutions; at most the share `overlap` of the layers may be decided as in any of them.
        """
        return self._solve([choice.score for choice in self.choices], self.budgets, apart_from, overlap)

    def least(self, target: int) -> list[int] | None:
        """The choices of least cost for one target, whatever they score, within the budgets of the others."""
        loose = tuple(np.inf if place == target else budget for place, budget in enumerate(self.budgets))
        return self._solve([choice.costs[target] for choice in self.choices], loose, (), 1.0)

    def several(self, count: int, overlap: float) -> list[list[int]]:
        """As many solutions as there are, up to `count`, the best first, each unlike those before it."""
        found: list[list[int]] = []
        while len(found) < count:
            made = self.best(found, overlap)
            if made is None:
                break
            found.append(made)
        return found

    def cost(self, chosen: Sequence[int]) -> list[float]:
        """What some choices cost together, for each target."""
        return [sum(self.choices[place].costs[target] for place in chosen) for target in range(len(self.budgets))]

    def score(self, chosen: Sequence[int]) -> float:
        """The sum of their scores."""
        return sum(self.choices[place].score for place in chosen)

    def _solve(
        self, weights: Sequence[float], budgets: Sequence[float], apart_from: Sequence[Sequence[int]], overlap: float
    ) -> list[int] | None:
        # Of two solutions as good as each other, or of time that is up, each process might have its own.
        return from_first(lambda: self._solved(weights, budgets, apart_from, overlap))

    def _solved(
        self, weights: Sequence[float], budgets: Sequence[float], apart_from: Sequence[Sequence[int]], overlap: float
    ) -> list[int] | None:
        from scipy.optimize import Bounds, LinearConstraint, milp

        count = len(self.choices)
        cover = np.zeros((self.layers, count))
        for place, choice in enumerate(self.choices):
            cover[list(choice.layers), place] = 1
        constraints = [LinearConstraint(cover, 1, 1)]
        for target, budget in enumerate(budgets):
            if np.isfinite(budget):
                row = np.array([choice.costs[target] for choice in self.choices])
                # In shares of the budget: costs may be seconds or bytes.
                scale = max(abs(budget), float(row.max(initial=0.0)), np.finfo(float).tiny)
                constraints.append(LinearConstraint(row[None] / scale, -np.inf, budget / scale))
        for earlier in apart_from:
            row = np.zeros(count)
            row[list(earlier)] = [len(self.choices[place].layers) for place in earlier]
            constraints.append(LinearConstraint(row[None], -np.inf, overlap * self.layers))
        with stdout_kept_clean():  # HiGHS prints a line now and then, though it is told not to
            made = milp(
                _scaled(weights),
                constraints=constraints,
                integrality=np.ones(count),
                bounds=Bounds(0, 1),
                options={"time_limit": SECONDS, "mip_rel_gap": GAP},
            )
        return None if made.x is None else [int(place) for place in np.flatnonzero(made.x > 0.5)]


def _scaled(weights: Sequence[float]) -> NDArray[np.float64]:
    array = np.asarray(weights, dtype=float)
    return array / max(float(np.abs(array).max(initial=0.0)), np.finfo(float).tiny)


def corrected(
    scores: NDArray[np.float64], models: Sequence[Sequence[int]], measured: Sequence[float], sure: float
) -> NDArray[np.float64]:
    """Scores moved as little as it takes for their sums to be nearer to what whole models were measured at.

    Options help and hurt each other: sums of single scores say too little of depth. The correction d is
    argmin sum over models (measured - sum of (scores + d) over the model)^2 / (sure * measured)^2
    + sum over options d^2 / scores^2, a ridge regression around what was measured of each option alone.

    Args:
        scores: [options]; models: which of them each model has; measured: what each was measured at.
        sure: how far a sum may miss, as a share of what was measured.
    """
    wide = np.maximum(np.abs(scores), 1e-3 * float(np.abs(scores).max(initial=0.0)) + 1e-12)
    rows = np.zeros((len(models), len(scores)))
    for row, model in zip(rows, models, strict=True):
        row[list(model)] = 1
    target = np.asarray(measured, dtype=float)
    spread = sure * np.maximum(target, 1e-12)
    # In units of each option's own score the prior is a plain ridge.
    a = rows * wide / spread[:, None]
    missing = (target - rows @ scores) / spread
    moved: NDArray[np.float64] = wide * (a.T @ np.linalg.solve(a @ a.T + np.eye(len(models)), missing))
    # What helps the others may pay for itself, but no option is worth less than nothing.
    return np.maximum(scores + moved, 0.0)
