"""A model judged by kind of text: the figures of each kind, and which of them fares much worse than the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from llmsurgeon.text.sequences import of_kind

Figures = TypeVar("Figures")

# A kind's perplexity ratio beyond so many times the rest's is said, where its interval lies above the rest's ratio.
MUCH_WORSE = 1.1


def by_kind(kinds: Sequence[str], figures: Callable[[Tensor], Figures]) -> dict[str, Figures]:
    """The `figures` of the sequences of each kind, from their mask [S]; {} where there are not two kinds."""
    names = dict.fromkeys(kinds)
    return {name: figures(of_kind(kinds, name)) for name in names} if len(names) > 1 else {}


def much_worse(kinds: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each kind that fares much worse against the parent than the others do, the worst first.

    kinds: figures of each kind as `to_dict` gives them. Others are compared by the geometric mean of their ratios. With
    fewer than two sequences of a kind nothing is sure, and nothing is said.
    """
    ratios = {name: found.get("perplexity_ratio") for name, found in kinds.items()}
    known = {name: ratio for name, ratio in ratios.items() if ratio}
    lines = []
    for name, ratio in sorted(known.items(), key=lambda item: -item[1]):
        interval = kinds[name].get("perplexity_ratio_interval")
        others = [other for each, other in known.items() if each != name]
        if not others or not interval:
            continue
        rest = _geometric_mean(others)
        if ratio > MUCH_WORSE * rest and interval[0] > rest:
            lines.append(
                f"{name} fares worse than the rest: perplexity ratio {ratio:.3f} ({interval[0]:.3f} to "
                f"{interval[1]:.3f}), {rest:.3f} on the other kinds"
            )
    return lines


def _geometric_mean(values: Sequence[float]) -> float:
    product = 1.0
    for value in values:
        product *= value ** (1 / len(values))
    return product
