"""Distillation of encoders: towards the parent's hidden states, and towards the means that embed its sequences.

B sequences, L tokens, D model width. Sentences are padded to L; padding is masked everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from llmsurgeon.evaluation.encoders import evaluate_states
from llmsurgeon.healing.distill.distill import GlobalTask, hardening_loss, weighted
from llmsurgeon.healing.distill.losses import cosine_distance
from llmsurgeon.healing.distill.targets import TappedModel, Targets, masked
from llmsurgeon.walk.variants import Variant
from llmsurgeon.walk.walk import walk

if TYPE_CHECKING:
    from llmsurgeon.operations.distill import Distill


def real_tokens(ids: Tensor, padding: int | None) -> Tensor:
    """Which of the ids hold tokens and no padding, bool of their shape."""
    return torch.ones_like(ids, dtype=torch.bool) if padding is None else ids != padding


def mean_pooled(states_BLD: Tensor, real_BL: Tensor) -> Tensor:
    """Mean over each sequence's tokens [B, D], in float32."""
    weights = real_BL[..., None].float()
    return (states_BLD.float() * weights).sum(1) / weights.sum(1)


class EncoderDistiller(nn.Module):
    """An encoder with its losses, as `Distiller` is a decoder with its own.

    hidden: 1 - cos of hidden states at block ends, mean over tokens and ends; pooled: 1 - cos of the means of each
    sequence's last hidden states. With ids alone it gives the last hidden states.
    """

    def __init__(self, student: TappedModel, targets: Targets, settings: Distill, padding: int | None) -> None:
        super().__init__()
        self.student, self.padding = student, padding
        self.weights = {
            "hidden": settings.hidden,
            "pooled": settings.pooled,
            "hardening": settings.trees.hardening if settings.trees else 0.0,
        }
        self._states = targets.states

    def forward(self, ids: Tensor, **answers: Tensor) -> dict[str, Tensor]:
        """`loss` and its parts, from the parent's `hidden` [B, E, L, D] and `last` [B, L, D]."""
        ends, states_BLD = self.student(ids, **masked(ids, self.padding))
        if not self.training:
            return {"states": states_BLD}
        real_BL = real_tokens(ids, self.padding)
        losses: dict[str, Tensor] = {}
        if ends:
            distances = [
                cosine_distance(end[real_BL], answers["hidden"][:, place][real_BL]) for place, end in enumerate(ends)
            ]
            losses["hidden"] = torch.stack(distances).mean()
        if self.weights["pooled"]:
            theirs = mean_pooled(self._states(answers["last"]), real_BL)
            losses["pooled"] = cosine_distance(mean_pooled(states_BLD, real_BL), theirs)
        if self.weights["hardening"]:
            losses["hardening"] = hardening_loss(self.student)
        return weighted(losses, self.weights)


class EncoderTask(GlobalTask):
    """The same rows, without the columns that are padding in all of a batch; judged by cosines."""

    _parent_states: Callable[[int], Tensor] | None = None

    def batch(self, numbers: np.ndarray, step: int, device: torch.device) -> dict[str, Any]:
        """ids and the parent's answers."""
        tokens = self.corpus.tokens(numbers)
        length = int(real_tokens(tokens, self.case.parent.padding).any(0).nonzero().max()) + 1
        tokens = tokens[:, :length]
        answers = self.targets.of(numbers, tokens)
        return {"ids": tokens.to(device), **{k: v[..., :length, :].to(device) for k, v in answers.items()}}

    def judge(self, module: nn.Module) -> dict[str, float]:
        """1 - cos of pooled states on the held-out sequences (the value; of hidden ones where those alone are trained
        on), and both cosines."""
        parent, device = self.case.parent, next(module.parameters()).device
        if self._parent_states is None:
            last = walk(parent, self.judged, [Variant()], batch=self.case.batch)[0]
            self._parent_states = lambda row: parent.states(last[row][self._real(row)].to(parent.device))
        with torch.no_grad():
            found = evaluate_states(self.judged, (lambda row: self._own(module, row, device), self._parent_states))
        cosines = {"pooled_cosine": found.pooled_cosine, "hidden_cosine": found.hidden_cosine}
        measures = {name: value for name, value in cosines.items() if value is not None}
        return {"value": 1 - measures["pooled_cosine" if self.settings.pooled else "hidden_cosine"], **measures}

    def _real(self, row: int) -> Tensor:
        return real_tokens(self.judged[row], self.case.parent.padding)

    def _own(self, module: nn.Module, row: int, device: torch.device) -> Tensor:
        """The student's last hidden states of a held-out sequence, without its padding."""
        states: Tensor = module(self.judged[row][self._real(row)][None].to(device))["states"][0]
        return states
