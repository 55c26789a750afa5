"""Which neurons of an FFN can go, and what is lost: the others make up for those that go (optimal brain surgeon).

Shapes: H FFN width, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Ridges, as multiples of the mean diagonal: of the elimination and of the fit that measures an error.
DAMPING = 1e-2
# Neurons that are eliminated at a time, as a share of the width.
AT_ONCE = 1 / 48


def eliminate(gram: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """(when each neuron goes [H], what is lost [H + 1] once so many are gone), float32.

    Those go first that the others can best stand in for. Removing neuron i and moving the others' output rows to make
    up for it costs ||v_i||^2 / [C^-1]_ii (optimal brain surgeon, applied to neurons); rows and inverse are then brought
    up to date. A few go at a time. The loss is the mean squared change of the output, damping included.

    Args:
        gram: covariance C of the activations [H, H]; down: output rows [H, D].
    """
    count = len(gram)
    damped = gram.clone()
    damped.diagonal().add_(DAMPING * gram.diagonal().mean().clamp_min(1e-12))
    inverse, rows = torch.cholesky_inverse(torch.linalg.cholesky(damped)), down.clone()
    gone = torch.zeros(count, dtype=torch.bool, device=gram.device)
    order, lost = gram.new_zeros(count), gram.new_zeros(count + 1)
    step = max(1, int(count * AT_ONCE))
    for start in range(0, count, step):
        cost = rows.square().sum(1) / inverse.diagonal()
        cost[gone] = torch.inf
        least = cost.topk(min(step, count - start), largest=False).indices
        order[least] = torch.arange(start, start + len(least), dtype=torch.float32, device=gram.device)
        correction = torch.linalg.solve(inverse[least][:, least], torch.cat([inverse[least], rows[least]], dim=1))
        # Of those that go together each one's part is in proportion to what it would cost alone.
        together = (rows[least] * correction[:, count:]).sum().clamp_min(0)
        alone = cost[least].cumsum(0)
        lost[start + 1 : start + 1 + len(least)] = lost[start] + together * alone / alone[-1].clamp_min(1e-30)
        touched = inverse[:, least]
        rows -= touched @ correction[:, count:]
        inverse -= touched @ correction[:, :count]
        gone[least] = True
        rows[least] = 0
        # What is gone must neither move others nor be divided by.
        inverse[least] = 0
        inverse[:, least] = 0
        inverse[least, least] = 1
    return order, lost


def eliminate_groups(gram: Tensor, out: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(when each group of `size` neighbours goes [G], what is lost [G + 1] once so many are gone), float32.

    As `eliminate`, with whole groups: removing group g and moving the others' output rows to make up for it costs
    tr(V_g^T (C^-1_gg)^-1 V_g). One goes at a time.

    Args:
        gram: covariance C of what the output projection reads [G * size, G * size]; out: its rows [G * size, D].
    """
    count = len(gram) // size
    damped = gram.clone()
    damped.diagonal().add_(DAMPING * gram.diagonal().mean().clamp_min(1e-12))
    inverse, rows = torch.cholesky_inverse(torch.linalg.cholesky(damped)), out.clone()
    left = list(range(count))
    order, lost = gram.new_zeros(count), gram.new_zeros(count + 1)
    for place in range(count):
        costs = torch.stack([_cost(inverse, rows, group, size) for group in left])
        at = int(costs.argmin())
        group = left.pop(at)
        order[group], lost[place + 1] = place, lost[place] + costs[at].clamp_min(0)
        own = slice(group * size, (group + 1) * size)
        touched = inverse[:, own].clone()
        rows -= touched @ torch.linalg.solve(touched[own], rows[own])
        inverse -= touched @ torch.linalg.solve(touched[own], inverse[own])
    return order, lost


def _cost(inverse: Tensor, rows: Tensor, group: int, size: int) -> Tensor:
    own = slice(group * size, (group + 1) * size)
    return (rows[own] * torch.linalg.solve(inverse[own, own], rows[own])).sum()
