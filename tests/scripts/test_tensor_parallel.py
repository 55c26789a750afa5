"""The benchmark of tensor parallelism: its model. What it counts is held in tests/modeling/test_two_ranks.py."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import tensor_parallel

    return tensor_parallel


def test_all_reduces_of_the_405b_and_of_what_the_recipe_makes_of_it(benchmark):
    """126 attentions and FFNs and the embedding; 50 attentions gone; 49 FFNs as 4."""
    models = benchmark.ultra()
    assert {name: calls for name, (_, calls) in models.items()} == {"parent": 253, "pruned": 203, "fused": 158}
    assert models["parent"][0] == pytest.approx(405.85e9, rel=1e-4)


def test_a_step_is_weights_and_reductions(benchmark):
    machine = benchmark.Machine(bandwidth=2e12, alpha=1e-5, beta=1e11)
    assert machine.step(4e9, 100, 1e6) == pytest.approx(2e-3 + 100 * (1e-5 + 1e-5))


def test_alpha_and_beta_are_found_again(benchmark):
    sizes = [1e3, 1e4, 1e5, 1e6]
    assert benchmark.line(sizes, [3e-5 + size / 2e9 for size in sizes]) == pytest.approx((3e-5, 2e9))
