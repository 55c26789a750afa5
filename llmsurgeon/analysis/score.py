"""What a score is: how something about a model is measured, for all steps of a recipe that ask for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmsurgeon.operations import Subject
from llmsurgeon.walk.runner import LayerRunner


@dataclass(frozen=True)
class Scene:
    """What is measured: the parent, over `tokens` [S, T], in batches. `subject` knows the scores measured before."""

    runner: LayerRunner
    tokens: Tensor
    subject: Subject
    batch: int = 4


@dataclass(frozen=True)
class Score:
    """How scores are measured.

    measure: from the scene and what steps say to any of the score's names, values for these names. What they say are
        the requests of `Step.requests`; the operations' files tell what theirs hold.
    tokens: at most so many are walked, whole sequences spread evenly; None: all.
    sentences: padding of padded sentences is left out.
    """

    measure: Callable[[Scene, Sequence[Any]], Mapping[str, Any]]
    tokens: int | None = None
    sentences: bool = False


def few(tokens: Tensor, wanted: int) -> Tensor:
    """About `wanted` tokens: whole sequences, spread evenly."""
    count = max(1, min(len(tokens), wanted // tokens.shape[1]))
    return tokens[torch.linspace(0, len(tokens) - 1, count).round().long()]


def batches(tokens: Tensor, batch: int) -> list[slice]:
    """The sequences of tokens [S, T], some at a time."""
    return [slice(start, start + batch) for start in range(0, len(tokens), batch)]
