"""The integer program against trying everything, and corrections against the normal equations."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from llmsurgeon.searching.solving import Choice, Program, corrected

LAYERS = 5


def some_program(seed: int) -> Program:
    """Five layers of four choices, and two runs; two targets."""
    chance = random.Random(seed)
    choices = [
        Choice((layer,), chance.random() * cut, (4 - cut + chance.random(), chance.random()))
        for layer in range(LAYERS)
        for cut in range(4)
    ]
    choices += [Choice((start, start + 1), chance.random(), (2.0, 0.3)) for start in (1, 2)]
    return Program(LAYERS, choices, (11.0, 2.6))


def everything(program: Program):
    """Every set of choices that decides each layer once."""
    by_layer = [[p for p, c in enumerate(program.choices) if c.layers[0] == layer] for layer in range(LAYERS)]
    for picked in product(*([None, *places] for places in by_layer)):
        places = [place for place in picked if place is not None]
        if sorted(layer for place in places for layer in program.choices[place].layers) == list(range(LAYERS)):
            yield places


def within(program: Program, places: list[int]) -> bool:
    return all(cost <= budget + 1e-9 for cost, budget in zip(program.cost(places), program.budgets, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_the_best_of_everything(seed):
    program = some_program(seed)
    best = min((p for p in everything(program) if within(program, p)), key=program.score)
    assert program.best() == sorted(best)


def test_diverse_solutions_are_the_best_of_those_unlike_earlier_ones():
    program = some_program(1)
    first, second, third = program.several(3, 0.6)

    def alike(a, b):
        return sum(len(program.choices[place].layers) for place in set(a) & set(b))

    for found, earlier in ((first, []), (second, [first]), (third, [first, second])):
        allowed = [
            p
            for p in everything(program)
            if within(program, p) and all(alike(p, other) <= 0.6 * LAYERS for other in earlier)
        ]
        assert program.score(found) == pytest.approx(min(map(program.score, allowed)))


def test_the_least_cost_of_one_target_within_the_others():
    program = some_program(2)
    least = program.least(0)
    rest = [p for p in everything(program) if program.cost(p)[1] <= program.budgets[1]]
    assert program.cost(least)[0] == pytest.approx(min(program.cost(p)[0] for p in rest))


def test_nothing_within_the_budgets():
    program = replace(some_program(0), budgets=(0.5, 2.6))
    assert program.best() is None and program.several(3, 0.8) == []


def test_corrected_scores_are_a_ridge_around_single_scores():
    scores, models, measured = np.array([0.0, 0.2, 0.5, 0.1]), [[1, 3], [2, 3]], [0.6, 0.5]
    found = corrected(scores, models, measured, sure=0.1)
    wide = np.maximum(scores, 1e-3 * 0.5 + 1e-12)
    rows = np.zeros((2, 4))
    for row, model in zip(rows, models, strict=True):
        row[model] = 1
    weights = 1 / (0.1 * np.array(measured)) ** 2
    left = rows.T @ (weights[:, None] * rows) + np.diag(1 / wide**2)
    moved = np.linalg.solve(left, rows.T @ (weights * (np.array(measured) - rows @ scores)))
    assert found == pytest.approx(np.maximum(scores + moved, 0))
    # What was too low together is raised, and where more was to be told more is.
    assert found[1] > scores[1] and abs(found[[1, 3]].sum() - 0.6) < abs(scores[[1, 3]].sum() - 0.6)
