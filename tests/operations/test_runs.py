"""Runs and windows against trying every cutting."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch

from llmsurgeon.model.parts import AttentionSpec, FFNSpec
from llmsurgeon.model.spec import LayerSpec, ModelSpec
from llmsurgeon.operations.runs import choose_runs, choose_windows, run_cost


def spec_of(*attends: bool, missing_ffn: tuple[int, ...] = ()) -> ModelSpec:
    """Blocks with and without attention."""
    blocks = tuple(
        LayerSpec(AttentionSpec(4, 4, 8) if a else None, None if i in missing_ffn else FFNSpec(96), (i,))
        for i, a in enumerate(attends)
    )
    return ModelSpec("llama", 32, 64, blocks, False)


def cuttings(layers: list[int]):
    """Every way of cutting a list into contiguous pieces."""
    for count in range(len(layers)):
        for cuts in combinations(range(1, len(layers)), count):
            edges = [0, *cuts, len(layers)]
            yield [tuple(layers[a:b]) for a, b in pairwise(edges)]


def worst_pair(dependency, run):
    return max(dependency[i][j] for i, j in combinations(run, 2))


def cost(dependency, pieces):
    """(blocks left, summed worst pairs)."""
    return len(pieces), pytest.approx(sum(worst_pair(dependency, piece) for piece in pieces if len(piece) > 1))


def allowed(dependency, pieces, max_run, limit):
    return all(
        len(p) <= max_run and (len(p) == 1 or limit is None or worst_pair(dependency, p) <= limit) for p in pieces
    )


@pytest.mark.parametrize("limit", [None, 0.8, 0.3])
@pytest.mark.parametrize("max_run", [2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_choose_runs_is_the_best_of_all_cuttings(seed, max_run, limit):
    generator = torch.Generator().manual_seed(seed)
    dependency = torch.rand(10, 10, generator=generator).double().tolist()
    attends = [True, False, False, False, True, False, False, False, False, False]
    # The last block is left alone; each stretch begins with the block whose attention stays.
    stretches = [[0, 1, 2, 3], [4, 5, 6, 7, 8]]
    found = choose_runs(spec_of(*attends), dependency, max_run, limit)
    assert {layer for run in found for layer in run} <= {layer for stretch in stretches for layer in stretch}
    for stretch in stretches:
        runs = [run for run in found if run[0] in stretch]
        fused = {layer for run in runs for layer in run}
        pieces = sorted([*runs, *((layer,) for layer in stretch if layer not in fused)])
        assert [layer for piece in pieces for layer in piece] == stretch
        assert allowed(dependency, pieces, max_run, limit)
        others = [p for p in cuttings(stretch) if allowed(dependency, p, max_run, limit)]
        best = min((len(p), sum(worst_pair(dependency, piece) for piece in p if len(piece) > 1)) for p in others)
        assert best == cost(dependency, pieces)


def test_stretches_end_at_attention_at_absent_ffns_and_before_the_last_block():
    ones = torch.ones(8, 8)
    assert choose_runs(spec_of(True, True, True), ones, 4) == ()
    assert choose_runs(spec_of(True, False, False), ones, 4) == ((0, 1),)
    assert choose_runs(spec_of(*[False] * 6), ones, 9) == ((0, 1, 2, 3, 4),)
    assert choose_runs(spec_of(*[False] * 6, missing_ffn=(2,)), ones, 9) == ((0, 1), (3, 4))


def test_run_cost_is_the_most_dependent_pair():
    dependency = [[0, 1, 5], [9, 0, 2], [9, 9, 0]]
    assert run_cost(dependency, (0, 1, 2)) == 5
    assert run_cost(dependency, (1, 2)) == 2


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("size", "count"), [(2, 3), (3, 2), (4, 1), (4, 9)])
def test_choose_windows_is_greedy(seed, size, count):
    dependency = torch.rand(9, 9, generator=torch.Generator().manual_seed(seed)).tolist()
    left = [tuple(range(start, start + size)) for start in range(9 - size + 1)]
    expected = []
    while left and len(expected) < count:
        best = min(
            left,
            key=lambda w: (worst_pair(dependency, w), sum(dependency[i][j] for i, j in combinations(w, 2))),
        )
        expected.append(best)
        left = [window for window in left if not set(window) & set(best)]
    assert choose_windows(dependency, range(9), size, count) == tuple(sorted(expected))


def test_windows_follow_the_layers_that_are_left():
    assert choose_windows(torch.ones(9, 9), [0, 4, 5, 8], 2, 1) == ((0, 4),)
