"""How well a model predicts text, and how sure the number is.

S sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom.
T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip

Interval = tuple[float, float]

# Rows of logits that are widened to float32 at a time: 256 rows of a 128k vocabulary are 128 MB.
CHUNK = 256


def token_losses(logits_TV: Tensor, targets_T: Tensor, chunk: int = CHUNK) -> Tensor:
    """Negative log likelihood of each target in nats, float32 [T]; `chunk` rows are in float32 at a time."""
    losses = [
        F.cross_entropy(logits.float(), targets, reduction="none")
        for logits, targets in rows(chunk, logits_TV, targets_T)
    ]
    return torch.cat(losses)


def rows(chunk: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors, `chunk` rows of each at a time."""
    return zip(*(tensor.split(chunk) for tensor in tensors), strict=True)


def mean_interval(means_S: Tensor) -> Interval | None:
    """95 % confidence interval of the mean over sequences, by Student's t; None for fewer than two sequences.

    The sequence is the unit because tokens of one text are not independent of each other.
    """
    values = means_S.double()
    if len(values) < 2:
        return None
    mean, freedom = values.mean().item(), len(values) - 1
    half = t_quantile(freedom) * values.std().item() / math.sqrt(len(values))
    return mean - half, mean + half


def t_quantile(freedom: int) -> float:
    """Two-sided 95 % quantile of Student's t."""
    # Beyond the table the first term of the expansion around the normal quantile is good to 0.001.
    return T_95[freedom - 1] if freedom <= len(T_95) else 1.960 + 2.372 / freedom


def perplexity(mean_loss: float) -> float:
    """exp of a mean log loss in nats; a loss beyond 700 counts as 700, where exp is still finite."""
    return math.exp(min(mean_loss, 700.0))


def perplexity_interval(losses_S: Tensor) -> Interval | None:
    """95 % confidence interval of the perplexity, from the mean log loss of each sequence."""
    interval = mean_interval(losses_S)
    return interval and (perplexity(interval[0]), perplexity(interval[1]))
