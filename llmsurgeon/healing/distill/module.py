"""The student with its losses: what accelerate wraps, shards and replicates.

B sequences, L tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from llmsurgeon.healing.distill.losses import LOSSES, Seen, weighted
from llmsurgeon.healing.distill.tapped import TappedModel, masked
from llmsurgeon.healing.distill.targets import Targets


class Distiller(nn.Module):
    """Called with ids [B, L] and the parent's answers it gives the losses; in eval mode, with ids alone, what judges
    read: a decoder's logits of the first row, an encoder's last hidden states.

    Args:
        weights: of the losses that count, by their names in LOSSES.
        fill: the token that fills an encoder's sentences up, None where all are of one length.
    """

    def __init__(
        self, student: TappedModel, targets: Targets, weights: Mapping[str, float], fill: int | None = None
    ) -> None:
        super().__init__()
        self.student, self.fill = student, fill
        self.weights = {name: weights[name] for name in LOSSES if weights.get(name)}
        self._targets = targets

    def forward(
        self, ids: Tensor, positions: Tensor | None = None, padding: int | None = None, **answers: Tensor
    ) -> dict[str, Tensor]:
        """`loss` and its parts; `positions` are those that carry the KL, all by default.

        `padding` is a block transformer's: so many masked places begin its first block, whose tokens nothing predicts.
        """
        begins = {} if padding is None else {"block_padding": padding}
        ends, states_BLD = self.student(ids, **masked(ids, self.fill), **begins)
        encoder = self.student.encoder
        if not self.training:
            return {"states": states_BLD} if encoder else {"logits": self.student.logits(states_BLD[0])}
        real = real_tokens(ids, self.fill) if encoder else None
        if padding is not None:
            first = self.student.model.config.block_transformer["block_length"] - 1 - padding
            ids, states_BLD = ids[:, first:], states_BLD[:, first:]
            answers = {name: values[:, first:] for name, values in answers.items()}
        seen = Seen(self.student, self._targets, ids, ends, states_BLD, answers, real, positions)
        return weighted({name: LOSSES[name].formula(seen) for name in self.weights}, self.weights)


def real_tokens(ids: Tensor, fill: int | None) -> Tensor:
    """Which of the ids hold tokens and no padding, bool of their shape."""
    return torch.ones_like(ids, dtype=torch.bool) if fill is None else ids != fill
