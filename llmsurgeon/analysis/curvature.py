"""What a small change of the last layer's output costs, to second order.

A model that is moved by a little is at KL(parent || model) = 1/2 d' F d of its parent, with d what moved and F the
Fisher information, whose mean over tokens y that the parent itself draws is E[g g'], g = d log p(y) / d output
(Martens, arXiv 1412.1193, sections 5 and 6). So the mean of (g . d)^2 / 2 over drawn tokens tells the KL of any small
change. Where tokens at many places are drawn one by one, the sum of their g may be pulled back as one: what different
places have to do with each other is nothing on the average. The distance of an encoder, 1 - cos, is to second order
|d'|^2 / (2 |h|^2), d' the part of d across h, which is the mean of (g . d)^2 / 2 for g = a random direction across h,
of variance 1 a dimension, over |h|.

Shapes: M draws, S sequences, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmsurgeon.analysis.divergence import HEAD_ROWS, compared
from llmsurgeon.progress import track
from llmsurgeon.walk.runner import LayerRunner
from llmsurgeon.walk.streams import Streams


def drawn_gradients(runner: LayerRunner, left: Tensor, draws: int, seed: int = 0) -> Tensor:
    """M gradients at what left the last layer, [S, T, D] -> [M, S, T, D], zero where `divergences` compares nothing.

    For a small change d of it, [S, T, D], the mean over m of ((g_m * d) summed over tokens and width)^2 / 2 is about
    the sum of the divergences at the positions that are compared, of each sequence.
    """
    generator = torch.Generator().manual_seed(seed)
    positions = compared(left.shape[1])
    found = Streams(draws, tuple(left.shape), left.dtype).data.zero_()
    rows = torch.cartesian_prod(torch.arange(len(left)), positions)
    pull = _of_cosines if runner.family.encoder else _of_tokens
    for start in track(range(0, len(rows), HEAD_ROWS), "draw", unit="lots"):
        sequence, position = rows[start : start + HEAD_ROWS].T
        hidden = left[sequence, position].to(runner.device)
        found[:, sequence, position] = pull(runner, hidden, draws, generator).to(left.dtype).cpu()
    return found


def _of_tokens(runner: LayerRunner, hidden: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Gradients of log p of tokens that are drawn from p, [t, D] -> [M, t, D]."""
    with torch.enable_grad():
        hidden = hidden.requires_grad_(True)
        log_p = runner.final(hidden).float().log_softmax(-1)
    tokens = torch.multinomial(log_p.detach().exp().cpu(), draws, replacement=True, generator=generator)
    picked = log_p.gather(1, tokens.to(log_p.device))  # [t, M]
    return torch.stack(
        [torch.autograd.grad(picked[:, m].sum(), hidden, retain_graph=m < draws - 1)[0] for m in range(draws)]
    )


def _of_cosines(runner: LayerRunner, hidden: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Gradients of states along random directions across them, over their length, [t, D] -> [M, t, D]."""
    with torch.enable_grad():
        hidden = hidden.requires_grad_(True)
        states = runner.states(hidden)
    wide = states.detach().float()
    length = wide.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    ahead = wide / length
    found = []
    for m in range(draws):
        random = torch.randn(wide.shape, generator=generator).to(wide.device)
        across = (random - (random * ahead).sum(-1, keepdim=True) * ahead) / length
        # A state of zeros, as of padding, has no direction.
        across = torch.where(wide.any(-1, keepdim=True), across, 0).to(states.dtype)
        found.append(torch.autograd.grad(states, hidden, across, retain_graph=m < draws - 1)[0])
    return torch.stack(found)
