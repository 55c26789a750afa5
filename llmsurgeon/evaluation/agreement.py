"""How far a model has moved from its parent. T tokens, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from llmsurgeon.evaluation.perplexity import CHUNK, rows


def kl_divergence(parent_TV: Tensor, model_TV: Tensor, chunk: int = CHUNK) -> Tensor:
    """KL(parent || model) of the next-token distributions in nats, float32 [T], from logits; `chunk` rows at a time."""
    divergences = []
    for parent, model in rows(chunk, parent_TV, model_TV):
        log_p, log_q = F.log_softmax(parent.float(), -1), F.log_softmax(model.float(), -1)
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(divergences)


def top1_agreement(parent_TV: Tensor, model_TV: Tensor) -> Tensor:
    """1 where both models' most likely next token is the same, else 0: float32 [T], from logits."""
    return (parent_TV.argmax(-1) == model_TV.argmax(-1)).float()
