"""A model and a parent with another tokenizer, on the same text: bits per byte, and figures of the tokens they share.

S passages, L tokens each, V vocabulary, K tokens of the parent's that the model has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmsurgeon.boundary.foreign import check_token_ids
from llmsurgeon.evaluation.bits_per_byte import Passage, bits_of
from llmsurgeon.evaluation.decoders import Evaluation, evaluate_hidden, logits_of
from llmsurgeon.evaluation.encoders import name_of
from llmsurgeon.evaluation.perplexity import CHUNK, rows, token_losses
from llmsurgeon.processes.share import Share

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def evaluate_across(
    model: PreTrainedModel, parent: PreTrainedModel, found: Sequence[Passage], kept: Tensor | None
) -> Evaluation:
    """Bits per byte come from each one's own tokens. Where the model's tokens are some of the parent's (`kept` [K]: the
    parent's id of each), KL and the like are taken on the model's tokens, of passages cut to one length, against the
    parent's distribution over these tokens; else there are none.

    The model reads a passage once, the parent its own tokens and the model's, once where these are the same.
    """
    usual = sorted(len(each.mine) for each in found)[len(found) // 2]
    whole = [place for place, each in enumerate(found) if len(each.mine) > 0.9 * usual]
    length = min(len(found[place].mine) for place in whole)
    tokens = torch.tensor([found[place].mine[:length] for place in whole])
    for reads, ids in ((model, [each.mine for each in found]), (parent, [each.theirs for each in found])):
        check_token_ids(min(map(min, ids)), max(map(max, ids)), reads.config.vocab_size, name_of(reads))
    mine, theirs = _Reader(model), _Reader(parent)
    outside: list[float] = []

    def my_logits(row: int) -> Tensor:
        return mine.read(found[whole[row]].mine)[:length]

    def their_logits(row: int) -> Tensor:
        assert kept is not None
        own, ids = found[whole[row]].theirs, tuple(kept[tokens[row]].tolist())
        every = theirs.read(own)[:length] if own[:length] == ids else logits_of(parent, torch.tensor([ids]))[0]
        inside = every[:, kept.to(every.device)]
        outside.append(_mass_outside(every, inside))
        return inside

    made = evaluate_hidden(tokens, my_logits, None if kept is None else their_logits)
    share = Share.of(len(found))
    passed = [found[row] for row in share.rows]
    losses = [(mine.losses(each.mine), theirs.losses(each.theirs)) for each in passed]
    bits = bits_of(found, *zip(*share.every_one(losses), strict=True))
    mass = None if kept is None else Share.of(len(whole)).mean(torch.tensor(outside, dtype=torch.float64)).item()
    return replace(made, bits=bits, outside_mass=mass)


@dataclass
class _Reader:
    """A model, and the log losses [L - 1] of the sequences that it has read."""

    model: PreTrainedModel
    known: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def read(self, ids: tuple[int, ...]) -> Tensor:
        """Logits [L, V] of a sequence."""
        row = torch.tensor([ids])
        logits = logits_of(self.model, row)[0]
        self.known[ids] = token_losses(logits[:-1], row[0, 1:].to(logits.device)).cpu()
        return logits

    def losses(self, ids: tuple[int, ...]) -> Tensor:
        """Log losses of a sequence, read again only where it was not read before."""
        if ids not in self.known:
            self.read(ids)
        return self.known[ids]


def _mass_outside(whole_TV: Tensor, kept_TK: Tensor) -> float:
    """Mean probability that the parent gives to tokens other than the kept ones."""
    parts = [
        1 - (inside.float().logsumexp(-1) - every.float().logsumexp(-1)).exp()
        for every, inside in rows(CHUNK, whole_TV, kept_TK)
    ]
    return torch.cat(parts).mean().item()
