"""The parent's hidden states in front of each layer, on text that fits and on text that scores; options stand on them.

Shapes: N layers, S sequences, T tokens, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from llmsurgeon.errors import SurgeryError
from llmsurgeon.healing.batches import Batches
from llmsurgeon.operations.base import HELD_OUT
from llmsurgeon.progress import track
from llmsurgeon.text.sequences import Sequences, held_out
from llmsurgeon.walk.runner import LayerRunner
from llmsurgeon.walk.streams import Streams

# Fewest sequences that score, and that fit.
FEWEST = 4
# Of the sequences that fit, the share that chooses a ridge.
CHOOSING = 0.25


@dataclass(frozen=True)
class Reading:
    """The text that scores, as some vocabulary cuts it and the parent reads it.

    entered: what enters the first layers, [n, S, T, D], of as many as are at hand; left: what leaves the last one.
    kept: the rows that share the probability, all where None; lengths: of the sequences [S], T where None.
    longer: its tokens a token of the parent's; lost: what it costs before a layer is changed, in nats a token of the
        parent's, of each sequence, [S].
    """

    entered: Tensor
    left: Tensor
    kept: Tensor | None
    lengths: Tensor | None
    longer: float
    lost: Tensor


@dataclass(frozen=True)
class Ground:
    """What every option is fitted and scored on.

    fits: the sequences that fit, some of which only choose a ridge; scores: those that score [S, T].
    fitting, scoring: what enters each layer, and what leaves the last, [N + 1, S, T, D].
    """

    runner: LayerRunner
    fits: Batches
    scores: Tensor
    fitting: Tensor
    scoring: Tensor

    @classmethod
    def of(cls, runner: LayerRunner, fits: Sequences, scores: Tensor, batch: int) -> Ground:
        """Walk the parent once over sequences that fit, and tokens that score [S, T], all of one length."""
        batches = Batches.of(fits.tokens, held_out(fits.kinds, CHOOSING), batch, runner.padding, fits.kinds)
        judging = _parts(scores, batch)
        texts = ((batches.tokens, [part for part, _ in batches.parts]), (scores, judging))
        streams = [_embedded(runner, tokens, parts) for tokens, parts in texts]
        with torch.no_grad():
            for index in track(range(len(runner.layers)), "walk the parent", unit="layers"):
                with runner.loaded(index):
                    for stream, (_, parts) in zip(streams, texts, strict=True):
                        for part in parts:
                            stream[index + 1, part] = runner.whole(index, stream[index, part].to(runner.device)).cpu()
        return cls(runner, batches, scores, *streams)

    @cached_property
    def reading(self) -> Reading:
        """The text that scores in the parent's own tokens."""
        return Reading(self.scoring, self.scoring[-1], None, None, 1.0, torch.zeros(len(self.scores)))

    def read(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What enters the parent's first layer and what leaves its last one, each [S, T, D], of other tokens [S, T]."""
        runner, parts = self.runner, _parts(tokens, max(part.stop - part.start for part in self.parts))
        entered = torch.cat([runner.embed(tokens[part]).cpu() for part in parts])
        stream = entered.clone()
        with torch.no_grad():
            for index in track(range(len(runner.layers)), "walk the parent", unit="layers"):
                with runner.loaded(index):
                    for part in parts:
                        stream[part] = runner.whole(index, stream[part].to(runner.device)).cpu()
        return entered, stream

    @property
    def parts(self) -> list[slice]:
        """The sequences that score, in the batches in which they go through a layer."""
        size = max(part.stop - part.start for part, _ in self.fits.parts)
        return _parts(self.scores, size)


def shared_out(text: Sequences, scoring: int, fitting: int) -> tuple[Sequences, Sequences]:
    """(sequences that fit, sequences that score), of about so many tokens, of each kind its part.

    Those that judge what a recipe made of this text are in neither.

    Raises:
        SurgeryError: there are not enough for both.
    """
    pool = text[~held_out(text.kinds, HELD_OUT)]
    count, length = text.tokens.shape
    if len(pool.kinds) < 2 * FEWEST:
        raise SurgeryError(
            f"search: {text.tokens.numel():,} tokens are too little text: of {count} sequences of {length} tokens "
            f"{len(pool.kinds)} are left beside those that judge, and {2 * FEWEST} are needed to fit and to score; "
            f"give --text with at least {3 * FEWEST * length:,} tokens, or lower --seq-len"
        )
    wanted = min(max(FEWEST, scoring // length) / len(pool.kinds), 0.5)
    chosen = held_out(pool.kinds, wanted)
    rest = pool[~chosen]
    wanted = max(FEWEST, fitting // length) / len(rest.kinds)
    return (rest if wanted >= 1 else rest[held_out(rest.kinds, wanted)]), pool[chosen]


def _parts(tokens: Tensor, batch: int) -> list[slice]:
    return [slice(start, min(start + batch, len(tokens))) for start in range(0, len(tokens), batch)]


def _embedded(runner: LayerRunner, tokens: Tensor, parts: list[slice]) -> Tensor:
    first = runner.embed(tokens[parts[0]])
    shape = (*tokens.shape, first.shape[-1])
    streams = Streams(len(runner.layers) + 1, shape, first.dtype).data
    for part in parts:
        streams[0, part] = runner.embed(tokens[part]).cpu()
    return streams
