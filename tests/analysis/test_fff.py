"""Where trees branch and which neurons stand where, against the slow obvious version."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from llmsurgeon.analysis.elimination import DAMPING, eliminate
from llmsurgeon.analysis.fff_leaves import grow_tree, leaf_of, leaf_sums, share_out
from llmsurgeon.analysis.fff_nodes import plant, reach_nodes


def tokens(count=256, width=8, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_trees_are_balanced_and_their_top_is_the_shallower_tree(depth):
    read = tokens() * torch.arange(1, 9) + 100
    weight, bias = grow_tree(read, depth)
    assert weight.shape == (2**depth - 1, 8) and bias.shape == (2**depth - 1,)
    counts = torch.bincount(leaf_of(read, weight, bias, depth), minlength=2**depth)
    assert counts.max() - counts.min() <= 2 * depth
    shallow, _ = grow_tree(read, depth - 1)
    assert torch.equal(weight[: len(shallow)], shallow)


def test_the_first_cut_separates_two_clusters():
    read = torch.cat([tokens(64) * 0.1 + 3, tokens(64, seed=1) * 0.1 - 3])
    leaf = leaf_of(read, *grow_tree(read, 1), 1)
    assert leaf[:64].unique().numel() == 1 == leaf[64:].unique().numel() and leaf[0] != leaf[-1]


def test_leaves_are_those_of_a_walk():
    read, depth = tokens(50), 3
    weight, bias = tokens(7, seed=2), tokens(7, 1, seed=3)[:, 0]
    for token, leaf in zip(read, leaf_of(read, weight, bias, depth).tolist(), strict=True):
        node = 0
        for _ in range(depth):
            node = 2 * node + (2 if token @ weight[node] + bias[node] >= 0 else 1)
        assert leaf == node - 7


def test_tokens_that_are_all_the_same_do_not_break_the_tree():
    read = torch.ones(32, 4)
    assert torch.isfinite(grow_tree(read, 3)[0]).all()


def error_without(gram, down, gone):
    """Least squares: what is lost of the output when `gone` go and the rest make up for it."""
    kept = [i for i in range(len(gram)) if i not in gone]
    rows = torch.linalg.solve(gram[kept][:, kept], gram[kept] @ down)
    correction = torch.zeros_like(down)
    correction[kept] = rows
    missing = down - correction
    return float((missing * (gram @ missing)).sum())


def test_neurons_go_in_the_order_of_what_the_others_cannot_make_up_for(monkeypatch):
    monkeypatch.setattr("llmsurgeon.analysis.elimination.AT_ONCE", 1e-9)
    active = tokens(400, 7) @ tokens(7, 7, seed=1)
    gram, down = active.T @ active / 400, tokens(7, 5, seed=2)
    damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(7)
    order = eliminate(gram, down)[0]
    assert sorted(order.tolist()) == list(range(7))
    gone = []
    for step in range(7):
        left = [i for i in range(7) if i not in gone]
        least = min(left, key=lambda i: error_without(damped, down, [*gone, i])) if len(left) > 1 else left[0]
        assert order[least] == step
        gone.append(least)


def test_elimination_beats_magnitude_on_neurons_that_repeat_others():
    base = tokens(500, 6)
    active = torch.cat([base, base + 0.01 * tokens(500, 6, seed=4)], dim=1)
    gram, down = active.T @ active / 500, tokens(12, 5, seed=2)
    kept = eliminate(gram, down)[0].topk(6).indices.tolist()
    assert sorted(i % 6 for i in kept) == list(range(6))


def test_shared_neurons_are_those_that_most_leaves_need():
    importance = torch.tensor([[9.0, 5, 1, 0], [9, 0, 1, 5]])
    shared, neurons = share_out(importance, 1, 1)
    assert shared.tolist() == [0] and neurons.tolist() == [[1], [3]]
    assert share_out(importance, 0, 2)[1].tolist() == [[0, 1], [0, 3]]


def test_nodes_reached_are_those_of_a_walk():
    right = tokens(40, 9) > 0
    nodes = torch.tensor([4, 2, -1, 0, 7, 8, 1])
    visited = torch.zeros(40, 9, dtype=torch.bool)
    reach_nodes(visited, right, nodes, 2)
    for token in range(40):
        node, expected = 0, set()
        for _ in range(3):
            neuron = int(nodes[node])
            if neuron >= 0:
                expected.add(neuron)
            node = 2 * node + 1 + int(neuron >= 0 and bool(right[token, neuron]))
        assert set(visited[token].nonzero().flatten().tolist()) == expected


def test_planted_trees_hold_each_neuron_once_and_the_strongest_at_the_roots():
    energy = tokens(60, 13).square() * torch.arange(1, 14).flip(0)
    nodes = plant(energy, tokens(60, 13, seed=1) > 0, 1, 5)
    used = nodes[nodes >= 0].tolist()
    assert sorted(used) == list(range(13)) and (nodes == -1).sum() == 2
    assert set(nodes[:, 0].tolist()) == set(energy.sum(0).topk(5).indices.tolist())


def test_a_child_stands_on_the_side_where_it_is_active():
    root = tokens(200, 1) > 0
    on = torch.rand(200, 1, generator=torch.Generator().manual_seed(7))
    energy = torch.cat([torch.full((200, 1), 9.0), on * root, on * ~root], dim=1)
    right = torch.cat([root, root, root], dim=1)
    assert plant(energy, right, 1, 1).tolist() == [[0, 2, 1]]


def test_greedy_planting_captures_most_of_the_best():
    """Against trying every assignment of four children to the four places of two trees."""
    energy, right = tokens(100, 6).square(), tokens(100, 6, seed=1) > 0
    energy[:, :2] += 10
    nodes = plant(energy, right, 1, 2)

    def captured(nodes):
        visited = torch.zeros(100, 6, dtype=torch.bool)
        for tree in nodes:
            reach_nodes(visited, right, tree, 1)
        return float((energy * visited).sum())

    roots = nodes[:, 0].tolist()
    children = [i for i in range(6) if i not in roots]
    best = max(
        captured(torch.tensor([[roots[0], a, b], [roots[1], c, d]]))
        for a, b in combinations(children, 2)
        for a, b in ((a, b), (b, a))
        for c, d in [[i for i in children if i not in (a, b)]]
        for c, d in ((c, d), (d, c))
    )
    assert captured(nodes) >= 0.97 * best


def test_the_sums_of_leaves_are_those_of_their_tokens_on_every_level():
    active, read = tokens(200, 6), tokens(200, seed=1)
    weight, bias = grow_tree(read, 2)
    levels = leaf_sums(active, leaf_of(read, weight, bias, 2), 2)
    assert [len(level) for level in levels] == [1, 2, 4]
    for depth, level in enumerate(levels):
        for k, found in enumerate(level):
            mine = active[leaf_of(read, weight, bias, depth) == k]
            assert found.count == len(mine)
            torch.testing.assert_close(found.mean, mine.mean(0))
            torch.testing.assert_close(found.size, mine.abs().sum(0))
            torch.testing.assert_close(found.covariance(), torch.cov(mine.T, correction=0), atol=1e-6, rtol=1e-5)


def test_a_leaf_without_tokens_has_sums_of_nothing():
    empty = leaf_sums(tokens(10, 3), torch.zeros(10, dtype=torch.long), 1)[1][1]
    assert empty.count == 0 and not empty.covariance().any()
