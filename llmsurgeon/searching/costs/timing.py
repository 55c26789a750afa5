"""Models timed in turn with a base, until their ratios are known well enough.

On a machine whose speed changes from second to second, the ratio within one round is what holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from statistics import median
from time import monotonic

from llmsurgeon.evaluation.speed import Spread

FEWEST_ROUNDS = 9
PRECISION = 0.006  # half of the 95 % interval, of a ratio
# Of a median of n normal values: its standard deviation is 1.2533 / sqrt(n) of theirs, which is the distance of their
# quartiles / 1.349. A few rounds in which something else ran move neither.
TO_DEVIATION = 1.2533 / 1.349


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
        spread = Spread.of([mine / theirs for theirs, mine in pairs])
        between = spread.upper_quartile - spread.lower_quartile
        half = 1.96 * TO_DEVIATION * between / sqrt(len(pairs))
        return cls(spread.median, half, len(pairs), median(theirs for theirs, _ in pairs))


def time_in_turn(
    base: Callable[[], float], models: Sequence[Callable[[], float]], most: int, seconds: float = inf
) -> list[Ratio]:
    """The ratio of each model to the base: base, first, base, second ... until all are known to PRECISION.

    One round before the first warms up; there are `most` at most, and fewer where they take more than so many seconds.
    """
    end = monotonic() + seconds
    runs = [base, *models]
    for run in runs:
        run()
    pairs: list[list[tuple[float, float]]] = [[] for _ in models]
    for number in range(1, most + 1):
        for kept, model in zip(pairs, models, strict=True):
            # One measurement of the base for each: what spoils it then spoils one ratio, not all alike.
            kept.append((base(), model()))
        found = [Ratio.of(kept) for kept in pairs]
        known = all(ratio.half <= PRECISION * ratio.value for ratio in found)
        if number >= FEWEST_ROUNDS and (known or monotonic() >= end):
            break
    return found
