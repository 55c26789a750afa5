"""Times of parts from times of models: weighted least squares, with a prior for what no model tells apart.

The prior is that a part takes time by what it multiplies. Where an engine runs no model without an attention, say, the
split between attention and FFN is the prior's, and their sum is measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEAST_HALF = 0.001  # no ratio is known better
PRIOR_SHARE, PRIOR_LEAST = 0.5, 0.1  # standard deviation of the prior: of the own time, and of the base's


@dataclass(frozen=True)
class Fitted:
    """Time of each column, in times of the base, and how well they are known together."""

    columns: tuple[Any, ...]
    times: np.ndarray[Any, Any]
    covariance: np.ndarray[Any, Any]

    def time(self, row: Mapping[Any, float]) -> float:
        """The time of a model, or of a layer, of which this is the row; never below zero."""
        return max(0.0, float(self._vector(row) @ self.times))

    def half(self, row: Mapping[Any, float]) -> float:
        """Half of the 95 % interval of that."""
        vector = self._vector(row)
        return 1.96 * float(np.sqrt(max(0.0, vector @ self.covariance @ vector)))

    def _vector(self, row: Mapping[Any, float]) -> np.ndarray[Any, Any]:
        return np.array([row.get(column, 0.0) for column in self.columns])


def fit(rows: Sequence[Counter[Any]], ratios: Sequence[tuple[float, float]], prior: Mapping[Any, float]) -> Fitted:
    """Solve for the times of the columns of `prior`.

    Args:
        rows: a row a model; the base's is among them, with the ratio 1.
        ratios: of each model, (ratio to the base, half of its 95 % interval).
        prior: column -> what share of the base's time it would take by what it multiplies.
    """
    columns = tuple(prior)
    x = np.array([[row.get(column, 0.0) for column in columns] for row in rows])
    y = np.array([value for value, _ in ratios])
    sigma = np.array([max(half, LEAST_HALF) / 1.96 for _, half in ratios])
    expected = np.array([prior[column] for column in columns])
    doubt = PRIOR_SHARE * expected + PRIOR_LEAST / np.maximum(1.0, np.abs(x).max(axis=0))
    precision = (x.T / sigma**2) @ x + np.diag(1 / doubt**2)
    covariance = np.linalg.inv(precision)
    times = expected + covariance @ ((x.T / sigma**2) @ (y - x @ expected))
    return Fitted(columns, times, covariance)
