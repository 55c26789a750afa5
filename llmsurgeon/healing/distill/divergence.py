"""Distances between a student and what it learns from. T tokens, D model width, V vocabulary, K tokens kept.

cosine     1 - cos(student's hidden state, parent's), mean over tokens (arXiv 2411.19146, section 5)
KL         KL(target || student) of the next token, nats a token; the target is all of the parent's distribution, its K
           likeliest tokens and one cell for all others, or the text's own next token, of which it is the cross-entropy
MSE        MSE(student's layer, parent's) / MSE(parent's, 0) (block-local distillation, arXiv 2411.19146, section 3)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Rows of logits that exist at a time: 512 rows of a 49k vocabulary are 50 MB in bfloat16. A device that is told what to
# do faster than it is done gets more: so many logits, 256 MB in bfloat16.
CHUNK, CHUNK_ELSEWHERE = 512, 1 << 27
# Logits that are compared at a time: on a CPU in float32 they stay in the cache of a core.
COMPARED_ON_CPU, COMPARED_ELSEWHERE = 1 << 17, 1 << 26

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TopTokens:
    """The parent's likeliest next tokens: ids [T, K] and their log-probabilities [T, K] over the whole vocabulary."""

    ids: Tensor
    log_p: Tensor


@dataclass(frozen=True)
class NextTokens:
    """The tokens that the text goes on with [T]: a distribution that is sure of them."""

    ids: Tensor


Target = Tensor | TopTokens | NextTokens


def cosine_distance(student: Tensor, parent: Tensor) -> Tensor:
    """1 - cos between hidden states [..., D], mean over tokens, in float32."""
    return 1 - F.cosine_similarity(student.float(), parent.float(), dim=-1).mean()


def normalised_mse(output: Tensor, target: Tensor) -> Tensor:
    """MSE(output, target) / MSE(target, 0), in float32: 0 is perfect, 1 is as bad as silence."""
    wanted = target.float()
    return (output.float() - wanted).square().mean() / wanted.square().mean()


def chunked_kl(
    hidden: Tensor,
    head: Head,
    parameters: Sequence[Tensor],
    target: Callable[[slice], Target],
    chunk: int | None = None,
) -> Tensor:
    """Mean KL(target || student) in nats, without ever holding the logits of all tokens.

    The gradient is found chunk by chunk along with the value, so that no logits wait for the backward pass.

    Args:
        hidden: the student's last hidden states [T, D].
        head: [t, D] -> logits [t, V].
        parameters: what `head` reads that may need gradients.
        target: rows -> the parent's logits [t, V] or its top tokens, for those rows of `hidden`; or the text's next
            tokens, of which the KL is the cross-entropy.
        chunk: rows at a time; None: what suits the device.
    """
    if chunk is None:
        chunk = CHUNK if hidden.device.type == "cpu" else max(CHUNK, CHUNK_ELSEWHERE // max(map(len, parameters)))
    kl: Tensor = _ChunkedKL.apply(hidden, head, target, chunk, *parameters)
    return kl


def kl_rows(logits: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """KL(parent || student) of each row [t], and its gradient with respect to the student's logits [t, V], float32."""
    log_q = torch.log_softmax(logits.float(), -1)
    if isinstance(target, TopTokens):
        return _top_kl(log_q, target)
    if isinstance(target, NextTokens):
        loss = -log_q.gather(-1, target.ids[:, None])[:, 0]
        gradient = log_q.exp_()
        gradient[torch.arange(len(gradient), device=gradient.device), target.ids] -= 1
        return loss, gradient
    log_p = torch.log_softmax(target.float(), -1)
    p = log_p.exp()
    kl = (p * log_p.sub_(log_q)).sum(-1)
    return kl, log_q.exp_().sub_(p)


def mean_kl_slopes(logits: Tensor, target: Target, count: int) -> tuple[Tensor, Tensor]:
    """`kl_rows` with the gradient of a mean over `count` rows, in the dtype of the logits; a few rows at a time."""
    slopes, found = torch.empty_like(logits), []
    for rows in compared(logits):
        kl, slope = kl_rows(logits[rows], rows_of(target, rows))
        slopes[rows] = slope.div_(count)
        found.append(kl)
    return torch.cat(found), slopes


def compared(logits: Tensor) -> Iterator[slice]:
    """The rows of logits [t, V], so many at a time as are compared with a target."""
    numbers = COMPARED_ON_CPU if logits.device.type == "cpu" else COMPARED_ELSEWHERE
    size = max(1, numbers // logits.shape[-1])
    return (slice(start, start + size) for start in range(0, len(logits), size))


def rows_of(target: Target, rows: slice) -> Target:
    """Some rows of a target."""
    if isinstance(target, TopTokens):
        return TopTokens(target.ids[rows], target.log_p[rows])
    return NextTokens(target.ids[rows]) if isinstance(target, NextTokens) else target[rows]


def _top_kl(log_q: Tensor, target: TopTokens) -> tuple[Tensor, Tensor]:
    """`kl_rows` over K + 1 cells: the parent's top tokens, and all others together."""
    ids = target.ids.long()
    log_p = target.log_p.float()
    top_q = log_q.gather(-1, ids)
    rest_p, rest_q = (_rest(top) for top in (log_p, top_q))
    p = log_p.exp()
    kl = (p * (log_p - top_q)).sum(-1) + rest_p * (rest_p.log() - rest_q.log())
    gradient = log_q.exp_()
    top_gradient = top_q.exp() - p
    # Among the other tokens the student may divide its mass as it likes: only their sum is pulled.
    gradient.mul_((1 - rest_p / rest_q)[:, None]).scatter_(-1, ids, top_gradient)
    return kl, gradient


def _rest(log_top: Tensor) -> Tensor:
    """The probability outside the top tokens [t]; rounding may leave less than nothing of it."""
    return (1 - log_top.exp().sum(-1)).clamp_min(1e-6)


class _ChunkedKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Head, target: Callable[[slice], Target], chunk: int, *parameters: Tensor
    ) -> Tensor:
        """The mean KL of all tokens; the gradients are computed here, while a chunk's logits exist."""
        moving = [p for p in parameters if p.requires_grad]
        ctx.wants = [p.requires_grad for p in parameters]
        total = torch.zeros((), device=hidden.device)
        hidden_gradient = torch.zeros_like(hidden)
        gradients = [torch.zeros_like(p) for p in moving]
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            part = hidden[rows].detach().requires_grad_()
            with torch.enable_grad():
                logits = head(part)
            kl, slope = mean_kl_slopes(logits.detach(), target(rows), len(hidden))
            total += kl.sum()
            found = torch.autograd.grad(logits, [part, *moving], slope)
            hidden_gradient[rows] = found[0]
            for gradient, new in zip(gradients, found[1:], strict=True):
                gradient += new
        ctx.save_for_backward(hidden_gradient, *gradients)
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        hidden_gradient, *found = (gradient * outer[0] for gradient in ctx.saved_tensors)
        gradients = iter(found)
        return hidden_gradient, None, None, None, *(next(gradients) if wanted else None for wanted in ctx.wants)
