"""The leaf form of fast feedforward networks: which tokens a leaf gets, which neurons, and what that costs.

Shapes: n tokens, D model width, H FFN width, L leaves, W neurons a leaf, S shared neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llmsurgeon.analysis.elimination import DAMPING, eliminate

Assignment = Literal["least_squares", "activation"]
# How much a leaf's neurons also answer for the other leaves' tokens; it steadies leaves with few tokens.
OTHERS = 0.1
# Standard deviation of a hyperplane's score over the tokens that meet it: soft decisions start out nearly hard.
SHARPNESS = 4.0


@dataclass
class Seen:
    """What a dense FFN did to the calibration tokens.

    read [n, D]: its input; active [n, H]: inner activations; branch [n, H]: pre-activations that a node branches on;
    empty in the leaf form; down [H, D]: its output rows; scale [n]: ||stream behind it - its mean||^2; held [n]: tokens
    that only judge.
    """

    read: Tensor
    active: Tensor
    branch: Tensor
    down: Tensor
    scale: Tensor
    held: Tensor


def grow_tree(read: Tensor, depth: int, rounds: int = 8) -> tuple[Tensor, Tensor]:
    """Hyperplanes of a balanced tree: float32 [2^depth - 1, D] and [2^depth - 1], breadth first.

    Each node halves the tokens [n, D] that reach it by 2-means along a line: it starts as their first principal
    direction and moves to the difference of the halves' means, cut at the median, `rounds` times. A score
    (read @ w + b) of at least 0 goes right.
    """
    nodes = 2**depth - 1
    weight, bias = read.new_zeros(nodes, read.shape[1]), read.new_zeros(nodes)
    place = torch.zeros(len(read), dtype=torch.long)
    for node in range(nodes):
        mine = place == node
        tokens = read[mine]
        if len(tokens) < 2:
            continue
        centred = tokens - tokens.mean(0)
        direction = _first_direction(centred)
        for _ in range(rounds):
            score = centred @ direction
            right = score >= _middle(score)
            if right.all():
                break
            moved = centred[right].mean(0) - centred[~right].mean(0)
            direction = moved / moved.norm().clamp_min(1e-12)
        score = centred @ direction
        scale = SHARPNESS / score.std().clamp_min(1e-6)
        weight[node] = direction * scale
        bias[node] = -(_middle(score) + tokens.mean(0) @ direction) * scale
        place[mine] = 2 * node + 1 + (tokens @ weight[node] + bias[node] >= 0).long()
    return weight, bias


def _middle(score: Tensor) -> Tensor:
    """A number that as many scores [n] lie below as above."""
    count = len(score)
    ranked = score.sort().values
    return (ranked[(count - 1) // 2] + ranked[count // 2]) / 2


def _first_direction(centred: Tensor, rounds: int = 12) -> Tensor:
    """First principal direction [D], by power iteration from the token that is farthest out."""
    direction = centred[centred.square().sum(-1).argmax()].clone()
    for _ in range(rounds):
        direction = centred.T @ (centred @ direction)
        direction /= direction.norm().clamp_min(1e-12)
    return direction


def leaf_of(read: Tensor, weight: Tensor, bias: Tensor, depth: int) -> Tensor:
    """The leaf of each token, int64 [n], in the first `depth` levels of the tree."""
    node = torch.zeros(len(read), dtype=torch.long)
    scores = read @ weight[: 2**depth - 1].T + bias[: 2**depth - 1] if depth else read
    for _ in range(depth):
        node = 2 * node + 1 + (scores.gather(1, node[:, None])[:, 0] >= 0)
    return node - (2**depth - 1)


@dataclass(frozen=True)
class Sums:
    """Of the activations A of a leaf's tokens: their number and sums of magnitudes [H]; with A counted from a `centre`
    [H] that lies near them, the sums of A [H] and A^T A [H, H]."""

    centre: Tensor
    count: int
    size: Tensor
    first: Tensor
    second: Tensor

    @property
    def mean(self) -> Tensor:
        """Mean activations [H]."""
        return self.centre + self.first / max(self.count, 1)

    def covariance(self) -> Tensor:
        """Covariance [H, H] of the activations; the mean is left to the leaf's bias."""
        mean = self.first / max(self.count, 1)
        return self.second / max(self.count, 1) - mean[:, None] * mean


def joined(parts: Sequence[Sums]) -> Sums:
    """The sums over several leaves."""
    names = ("count", "size", "first", "second")
    return Sums(parts[0].centre, *(sum(getattr(part, name) for part in parts) for name in names))


def leaf_sums(active: Tensor, leaf: Tensor, depth: int) -> list[list[Sums]]:
    """The sums of each leaf of each level from 0 to `depth`, from activations [n, H] and leaves [n] at `depth`.

    Tokens are multiplied once: a leaf of a shallower tree is the two below it.
    """
    centre = active.mean(0)
    levels = [[_sums(active[leaf == k], centre) for k in range(2**depth)]]
    while len(levels[0]) > 1:
        below = levels[0]
        levels.insert(0, [joined(below[k : k + 2]) for k in range(0, len(below), 2)])
    return levels


def _sums(active: Tensor, centre: Tensor) -> Sums:
    centred = active - centre
    return Sums(centre, len(active), active.abs().sum(0), centred.sum(0), centred.T @ centred)


def importance_of(leaf: Sums, down: Tensor, everyone: Tensor, assignment: Assignment) -> Tensor:
    """How much a leaf needs each neuron [H]: higher is more. Only the order counts."""
    if assignment == "activation":
        return (leaf.size * down.norm(dim=1)).argsort().argsort().float()
    return eliminate(leaf.covariance() + everyone, down)[0]


def share_out(importance: Tensor, shared: int, leaf_width: int) -> tuple[Tensor, Tensor]:
    """(shared [S], neurons of the leaves [L, W]) from importances [L, H]: shared are those that most leaves need."""
    always = importance.mean(0).topk(shared).indices.sort().values
    own = importance.clone()
    own[:, always] = -torch.inf
    return always, own.topk(leaf_width, dim=1).indices.sort(dim=1).values


def leaf_errors(
    seen: Seen, leaf: Tensor, sums: Sequence[Sums], everyone: Tensor, shares: Sequence[tuple[Tensor, Tensor]]
) -> list[float]:
    """The error of `Routing` for each (shared, neurons); the shared neurons' rows are taken as free in each leaf,
    which they are not quite."""
    totals = [0.0] * len(shares)
    for k, mine in enumerate(sums):
        judge = seen.active[(leaf == k) & seen.held]
        if not len(judge):
            continue
        mean, gram = mine.mean, mine.covariance() + everyone
        target, wanted = gram @ seen.down, (judge - mean) @ seen.down
        scale = seen.scale[(leaf == k) & seen.held]
        for place, (shared, neurons) in enumerate(shares):
            kept = torch.cat([shared, neurons[k]])
            system = gram[kept][:, kept]
            system.diagonal().add_(DAMPING * system.diagonal().mean())
            rows = torch.cholesky_solve(target[kept], torch.linalg.cholesky(system))
            missing = wanted - (judge[:, kept] - mean[kept]) @ rows
            totals[place] += float((missing.square().sum(-1) / scale).sum())
    return [total / int(seen.held.sum()) for total in totals]
