"""How weights move: the optimizer, its learning rate, and how coarse what trains is seen."""

from __future__ import annotations

import importlib
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmsurgeon.errors import SurgeryError
from llmsurgeon.operations.distill import check_optimizer

if TYPE_CHECKING:
    from llmsurgeon.operations.distill import Distill


def optimizer_of(settings: Distill, module: nn.Module) -> torch.optim.Optimizer:
    """AdamW, or the class that the recipe names by its dotted path, of a library that it may name.

    Raises:
        SurgeryError: there is no such optimizer, or it cannot be made here.
    """
    moving = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in moving if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in moving if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=True)
    try:
        library, _, name = check_optimizer(settings.optimizer).rpartition(".")
        made: Any = getattr(importlib.import_module(library), name)
        if not (isinstance(made, type) and issubclass(made, torch.optim.Optimizer)):
            raise TypeError("it is not an optimizer of torch's kind")
        make: Any = made
        optimizer: torch.optim.Optimizer = make(groups, lr=settings.learning_rate)
    except Exception as error:  # what a library of others meets on a machine that it was not made for
        raise SurgeryError(f"distill.optimizer: {settings.optimizer} cannot be used: {error}") from error
    return optimizer


class Latent(nn.Module):
    """A module that is used as something coarser than what trains, to the share `share`; wholly so when judged."""

    share: float = 1.0


def coarse_share(settings: Distill, reached: float) -> float:
    """lambda of `Latent` modules and of BitLinears: from 0 to 1 over the first part of the run."""
    return min(1.0, reached / settings.ternary_warmup) if settings.ternary_warmup else 1.0


def learning_rate(settings: Distill, step: int, progress: float) -> float:
    """Linear warm-up over the first steps, then a cosine down to `final_learning_rate` of the peak."""
    warm = min(1.0, (step + 1) / (settings.warmup + 1))
    low = settings.final_learning_rate
    return settings.learning_rate * warm * (low + (1 - low) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2)
