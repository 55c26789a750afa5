"""Models timed in turn with a base, until their ratios are known well enough.

On a machine whose speed changes from second to second, the ratio within one round is what holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import median

FEWEST_ROUNDS, MOST_ROUNDS = 7, 25
PRECISION = 0.006  # half of the 95 % interval, of a ratio
# Of a median of n normal values: its standard deviation is 1.2533 / sqrt(n) of theirs, which is 1.4826 times the median
# of their distances to it. (Rousseeuw and Croux 1993.)
TO_DEVIATION = 1.2533 * 1.4826


@dataclass(frozen=True)
class Ratio:
    """A model's seconds over the base's: median of the rounds, half of its 95 % interval; the base's own."""

    value: float
    half: float
    rounds: int
    base_seconds: float

    @classmethod
    def of(cls, pairs: Sequence[tuple[float, float]]) -> Ratio:
        """Of rounds of (base's seconds, model's seconds)."""
        ratios = [mine / theirs for theirs, mine in pairs]
        middle = median(ratios)
        spread = median(abs(ratio - middle) for ratio in ratios)
        half = 1.96 * TO_DEVIATION * spread / sqrt(len(ratios))
        return cls(middle, half, len(ratios), median(theirs for theirs, _ in pairs))


def time_in_turn(
    base: Callable[[], float], models: Sequence[Callable[[], float]], after_round: Callable[[], object] = lambda: None
) -> list[Ratio]:
    """The ratio of each model to the base: base, first, second ..., base ... until all are known to PRECISION.

    One round before the first warms up. MOST_ROUNDS bound it.
    """
    runs = [base, *models]
    for run in runs:
        run()
    pairs: list[list[tuple[float, float]]] = [[] for _ in models]
    for number in range(1, MOST_ROUNDS + 1):
        theirs = base()
        for kept, model in zip(pairs, models, strict=True):
            kept.append((theirs, model()))
        after_round()
        found = [Ratio.of(kept) for kept in pairs]
        if number >= FEWEST_ROUNDS and all(ratio.half <= PRECISION * ratio.value for ratio in found):
            break
    return found
