"""The node form of fast feedforward networks: trees of neurons, and what a token meets in them.

Shapes: n tokens, H FFN width, M nodes a tree.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reach_nodes(visited: Tensor, right: Tensor, nodes: Tensor, depth: int) -> None:
    """Mark in `visited` [n, H] the neurons that each token meets in one tree, `nodes` [M] breadth first.

    right: [n, H], where a neuron sends the token if it decides. A node without a neuron sends it left.
    """
    place = torch.zeros(len(visited), dtype=torch.long)
    everyone = torch.arange(len(visited))
    for _ in range(depth + 1):
        neuron = nodes[place]
        there = neuron >= 0
        visited[everyone[there], neuron[there]] = True
        place = 2 * place + 1 + (there & right[everyone, neuron.clamp_min(0)])


def plant(energy: Tensor, right: Tensor, depth: int, trees: int) -> Tensor:
    """Trees of neurons, int64 [trees, 2^(depth + 1) - 1], breadth first; -1 where no neuron is left.

    The strongest neurons stand at the roots, which every token meets, the next ones a level lower, and so on. Each
    takes, strongest first, the free place whose tokens carry most of what it does.

    Args:
        energy: squared activation times squared norm of the output row [n, H].
        right: where each neuron sends a token that meets it, [n, H].
    """
    strongest = energy.sum(0).argsort(descending=True)
    nodes = torch.full((trees, 2 ** (depth + 1) - 1), -1, dtype=torch.long)
    used = 0
    reach = torch.ones(len(energy), trees)
    for level in range(depth + 1):
        places = torch.arange(2**level - 1, 2 ** (level + 1) - 1)
        mine = strongest[used : used + trees * len(places)]
        used += len(mine)
        # reach [n, trees * places of this level]: 1 where a token comes by.
        worth = energy[:, mine].T @ reach
        free = torch.ones(worth.shape[1], dtype=torch.bool)
        for row, neuron in zip(worth, mine.tolist(), strict=True):
            best = int(row.where(free, -torch.inf).argmax())
            free[best] = False
            nodes[best // len(places), places[best % len(places)]] = neuron
        if level < depth:
            decider = nodes[:, places].flatten()
            goes = right[:, decider.clamp_min(0)].float() * (decider >= 0)
            reach = torch.stack([reach * (1 - goes), reach * goes], dim=-1).flatten(1)
    return nodes
