"""Shapes of fast feedforward networks within a budget: those that add least measured error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmsurgeon.model.parts import FFFSpec


def within_budget(
    options: Mapping[int, Sequence[tuple[int, float, FFFSpec]]], dense: Mapping[int, int], keep: float
) -> dict[int, FFFSpec]:
    """The shapes that add least error within a budget of rows; layers that stay dense are left out.

    Starts with everything dense and, step by step, takes the cut that saves most rows for the error it adds.

    Args:
        options: layer -> (rows, error, shape); dense: layer -> rows of the dense FFN, whose error is 0.
        keep: share of the dense rows that may stay.
    """
    now = {layer: (rows, 0.0) for layer, rows in dense.items()}
    chosen: dict[int, FFFSpec] = {}
    budget = keep * sum(dense.values())
    while sum(rows for rows, _ in now.values()) > budget:
        steps = [
            ((error - now[layer][1]) / (now[layer][0] - rows), layer, rows, error, spec)
            for layer, given in options.items()
            for rows, error, spec in given
            if rows < now[layer][0]
        ]
        if not steps:
            break
        _, layer, rows, error, spec = min(steps, key=lambda step: step[:3])
        now[layer], chosen[layer] = (rows, error), spec
    return _refilled(options, now, chosen, budget)


def _refilled(
    options: Mapping[int, Sequence[tuple[int, float, FFFSpec]]],
    now: dict[int, tuple[int, float]],
    chosen: dict[int, FFFSpec],
    budget: float,
) -> dict[int, FFFSpec]:
    """The last cut may have saved too much: give back what still fits, where it lowers the error most."""
    while True:
        left = budget - sum(rows for rows, _ in now.values())
        steps = [
            (now[layer][1] - error, layer, rows, error, spec)
            for layer in chosen
            for rows, error, spec in options[layer]
            if 0 < rows - now[layer][0] <= left and error < now[layer][1]
        ]
        if not steps:
            return dict(sorted(chosen.items()))
        _, layer, rows, error, spec = max(steps, key=lambda step: step[:3])
        now[layer], chosen[layer] = (rows, error), spec
