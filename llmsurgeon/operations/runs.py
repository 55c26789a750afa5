"""Choosing runs and windows from a dependency matrix (FFN Fusion, arXiv 2503.18908, sections 3 and 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmsurgeon.model.spec import ModelSpec


def run_cost(dependency: Any, layers: Sequence[int]) -> float:
    """Largest M[i, j] over all pairs of the run: its most dependent pair."""
    return max(float(dependency[i][j]) for k, i in enumerate(layers) for j in layers[k + 1 :])


def choose_runs(
    spec: ModelSpec, dependency: Any, max_run: int, max_dependency: float | None = None
) -> tuple[tuple[int, ...], ...]:
    """Disjoint runs of at most `max_run` layers that merge as many layers as possible at the least dependency.

    Every stretch of layers in which all but the first are attention-free is cut into runs. Among all cuts
    the one that leaves the fewest layers wins; ties go to the smallest sum of run costs (dynamic programming
    over the cut points). The model's last FFN is left alone: fusing it hurts most (section 4). Runs above
    `max_dependency` are not made.

    Args:
        dependency: M [N, N], M[i][j] = how much FFN j depends on FFN i (parent layer numbers).
    """
    runs: list[tuple[int, ...]] = []
    stretch: list[int] = []
    layers = spec.layers[:-1]
    for layer in layers:
        fusable = layer.ffn is not None and not layer.branches and len(layer.parents) == 1
        if fusable and layer.attention is None:
            stretch.append(layer.parents[0])
            continue
        runs += _cut(stretch, dependency, max_run, max_dependency)
        stretch = [layer.parents[0]] if fusable else []
    return tuple(runs + _cut(stretch, dependency, max_run, max_dependency))


def _cut(stretch: list[int], dependency: Any, max_run: int, max_dependency: float | None) -> list[tuple[int, ...]]:
    # best[k]: (layers left, summed cost, runs) for the first k layers of the stretch
    best: list[tuple[int, float, list[tuple[int, ...]]]] = [(0, 0.0, [])]
    for end in range(1, len(stretch) + 1):
        options = []
        for size in range(1, min(max_run, end) + 1):
            left, cost, runs = best[end - size]
            run = tuple(stretch[end - size : end])
            if size == 1:
                options.append((left + 1, cost, runs))
                continue
            dependent = run_cost(dependency, run)
            if max_dependency is None or dependent <= max_dependency:
                options.append((left + 1, cost + dependent, [*runs, run]))
        best.append(min(options, key=lambda option: option[:2]))
    return best[-1][2]


def choose_windows(dependency: Any, layers: Sequence[int], size: int, count: int) -> tuple[tuple[int, ...], ...]:
    """Greedy windows for full-block parallelisation: the least max M first, ties by the sum, overlaps dropped."""

    def cost(window: tuple[int, ...]) -> tuple[float, float]:
        pairs = [float(dependency[i][j]) for k, i in enumerate(window) for j in window[k + 1 :]]
        return max(pairs), sum(pairs)

    windows = [tuple(layers[start : start + size]) for start in range(len(layers) - size + 1)]
    chosen: list[tuple[int, ...]] = []
    for window in sorted(windows, key=cost):
        if len(chosen) < count and not any(set(window) & set(other) for other in chosen):
            chosen.append(window)
    return tuple(sorted(chosen))
