"""Calibration windows in the batches in which layers see them, and a model's stream taken through a loaded layer.

S sequences, T tokens each, D model width; a stream [S, T, D] is kept on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from llmsurgeon.processes.exchange import things
from llmsurgeon.processes.share import dealt
from llmsurgeon.walk.runner import LayerRunner
from llmsurgeon.walk.streams import Streams, copied
from llmsurgeon.walk.walk import Parts, through


@dataclass(frozen=True)
class Batches:
    """Windows in the order in which they are walked: those that fit first, then those that judge.

    tokens: [S, T], the share of this process. parts: (sequences, True where they judge), never both in one. padding:
    the token that fills sequences up, None where all are of one length. kinds: what kind of text each sequence is.
    counts: tokens that fit and that judge, of all processes, padding included.
    """

    tokens: Tensor
    parts: tuple[tuple[slice, bool], ...]
    padding: int | None = None
    kinds: tuple[str, ...] = ()
    counts: tuple[int, int] = (0, 0)

    @classmethod
    def of(
        cls, windows: Tensor, held_out: Tensor, batch: int, padding: int | None = None, kinds: Sequence[str] = ()
    ) -> Batches:
        """From windows [S, T] and the mask [S] of those that only judge; `batch` sequences go through together.

        kinds: of each window; text of one kind, where none are told apart.

        Raises:
            SurgeryError: of those that fit there are fewer than processes.
        """
        kinds = kinds or ["text"] * len(windows)
        fits, judges = torch.nonzero(~held_out).flatten(), torch.nonzero(held_out).flatten()
        counts = len(fits) * windows.shape[1], len(judges) * windows.shape[1]
        order = torch.cat([dealt(fits, "what is fitted needs a sequence in each process"), dealt(judges)])
        fitting = int((~held_out[order]).sum())
        edges = [*range(0, fitting, batch), *range(fitting, len(order), batch), len(order)]
        parts = tuple((slice(a, b), a >= fitting) for a, b in pairwise(edges))
        return cls(windows[order], parts, padding, tuple(kinds[row] for row in order), counts)

    @property
    def held_out(self) -> Tensor:
        """The mask [S] of the sequences that judge, in the order of `tokens`."""
        return torch.cat([torch.full((part.stop - part.start,), held) for part, held in self.parts])

    def rows(self, part: slice, values: Tensor) -> Tensor:
        """Values [s, T, *] or [s * T, *] of a part's sequences as [n, *], without padding."""
        rows = values.reshape(self.tokens[part].numel(), -1)
        # Without padding nothing is picked out: the widest features of a batch are not copied.
        if self.padding is None:
            return rows
        return rows[(self.tokens[part] != self.padding).flatten().to(values.device)]


def embedded(runner: LayerRunner, batches: Batches) -> Tensor:
    """What enters the first layer; the runner also learns how its layers are called."""
    stream: Tensor | None = None
    for part, _ in batches.parts:
        hidden = runner.embed(batches.tokens[part]).cpu()
        if stream is None:
            stream = Streams(1, (len(batches.tokens), *hidden.shape[1:]), hidden.dtype).data[0]
        stream[part] = hidden
    assert stream is not None
    return stream


def passes(runner: LayerRunner, batches: Batches, index: int, stream: Tensor) -> Iterator[tuple[slice, Parts]]:
    """The loaded layer on a stream, part after part; a part may be overwritten once it was given."""
    for part, _ in batches.parts:
        yield part, through(runner, index, stream[part].to(runner.device))


def attended(runner: LayerRunner, batches: Batches, index: int, stream: Tensor) -> Tensor:
    """The stream behind the loaded layer's attention."""
    behind = copied(stream)
    for part, _ in batches.parts:
        contribution = runner.attend(index, stream[part].to(runner.device))
        if contribution is not None:
            behind[part] += contribution.cpu()
    return behind


def left(
    runner: LayerRunner, batches: Batches, index: int, stream: Tensor, behind: Tensor | None, into: Tensor
) -> Tensor:
    """The stream behind the loaded layer, written to `into`, which may be the stream itself.

    behind: the stream behind the layer's attention; None runs the layer as the model itself does.
    """
    for part, _ in batches.parts:
        hidden = stream[part].to(runner.device)
        if behind is None:
            into[part] = runner.whole(index, hidden).cpu()
            continue
        middle = behind[part].to(runner.device)
        ffn = runner.feed_forward(index, hidden if runner.parallel_residual else middle)
        into[part] = (middle if ffn is None else middle + ffn).cpu()
    return into


def token_weights(stream: Tensor) -> Tensor:
    """What each token's row counts in a fit of what is added to `stream` [S, T, D]: [S, T], at most 1.

    Norms see tokens relative to their size, and a window's first token may be a hundred times as large as the others
    (massive activations, arXiv 2402.17762): squared errors of a few such tokens would decide the fit of all. Tokens
    larger than the median count as that one does.
    """
    sizes = stream.float().norm(dim=-1)
    return (torch.cat(things(sizes.flatten())).median() / sizes).nan_to_num(1).clamp(max=1)
