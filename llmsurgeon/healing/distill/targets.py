"""What the parent says about the training text: hidden states at layer ends and next-token distributions.

`StoredTargets` walks the parent layer by layer over rows that are about to be needed, once, and keeps the answers on
disk: the parent may be larger than memory, and a second pass over the text costs nothing. `LiveTargets` keeps the
parent in memory and runs it beside the student, for text that is seen once.

N rows of L tokens, D model width, E layer ends ("taps"), K tokens kept of each distribution.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from llmsurgeon.checkpoint.kept import cache_folder
from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats.models import empty_model, fill
from llmsurgeon.healing.distill.answer_files import AnswerFiles
from llmsurgeon.healing.distill.data import Corpus
from llmsurgeon.healing.distill.divergence import Target, TopTokens, compared
from llmsurgeon.healing.distill.tapped import TappedModel, masked
from llmsurgeon.progress import remark
from llmsurgeon.walk.runner import LayerRunner
from llmsurgeon.walk.variants import Variant
from llmsurgeon.walk.walk import Parts, walk

# Rows for which the parent is run at a time. A resumed run meets the same groups of rows, so that its targets are the
# same to the last bit.
AHEAD = 64
# Changes with the form of the files.
LAYOUT = 2
# Columns of logits that are compared before any is sorted.
GROUP = 8


@dataclass(frozen=True)
class Wanted:
    """Which answers the losses need.

    taps: parent layers whose output is wanted; -1 for what enters the first.
    top_k: how many tokens of each distribution; None for all of it, 0 for none.
    """

    taps: tuple[int, ...]
    top_k: int | None

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names under which what the parent says in the end is kept."""
        return () if self.top_k == 0 else ("last",) if self.top_k is None else ("top_ids", "top_log_p")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all answers to one row."""
        return (*(f"hidden-{tap}" for tap in self.taps), *self.outputs)

    @property
    def nothing(self) -> bool:
        """True where the losses do not ask the parent."""
        return not self.taps and self.top_k == 0


class Targets(Protocol):
    """Something that knows what the parent says."""

    def prepare(self, numbers: np.ndarray) -> None:
        """Make sure of the answers for these rows."""

    def of(self, numbers: np.ndarray, tokens: Tensor) -> dict[str, Tensor]:
        """The answers for a batch of rows, as tensors that `distribution` and the losses read.

        hidden [B, E, L, D]; and last [B, L, D], which `logits` reads, or top_ids and top_log_p [B, L, K].
        """

    def logits(self, last: Tensor) -> Tensor:
        """The parent's logits [t, V] from `last` [t, D]."""

    def states(self, last: Tensor) -> Tensor:
        """The parent's last hidden states from `last` [..., D]: its final norm is in them."""


class StoredTargets:
    """Answers on disk, by row.

    Args:
        parent: runs the parent layer by layer; asked for only where something is missing.
        fingerprint: names the parent as it computes (weights, dtype, kind of device, libraries); with the data's key
            and what is wanted it names the files.
        batch: rows that go through a layer together.
    """

    def __init__(
        self, corpus: Corpus, parent: Callable[[], LayerRunner], fingerprint: str, wanted: Wanted, batch: int
    ) -> None:
        self.corpus, self.parent, self.wanted, self.batch = corpus, parent, wanted, batch
        self.stores = [AnswerFiles(_folder(fingerprint, rows.key, wanted), len(rows.tokens)) for rows in corpus.sources]

    def prepare(self, numbers: np.ndarray) -> None:
        """Run the parent over the rows whose answers are not there yet, or no longer whole, each of its layers once."""
        if self.wanted.nothing:
            return
        places = [self.corpus.place(int(number)) for number in numbers]
        known = [self.stores[source].known(row) for source, row in places]
        damaged = [i for i, place in enumerate(places) if known[i] and not self._is_whole(place)]
        if damaged:
            remark(
                f"{self.stores[places[damaged[0]][0]].folder}: what the parent said of {len(damaged)} of {len(places)} "
                "rows is damaged or gone; it is asked again"
            )
        todo = sorted({*damaged, *(i for i in range(len(places)) if not known[i])})
        if not todo:
            return
        rows = [places[i] for i in todo]
        tokens = self.corpus.tokens(numbers[todo])

        def keep(name: str, first: int, values: Tensor) -> None:
            for (source, row), value in zip(rows[first : first + len(values)], values, strict=True):
                self.stores[source].put(name, row, value)

        _answer(self.parent(), tokens, self.wanted, self.batch, keep)
        for source, store in enumerate(self.stores):
            store.know([row for place, row in rows if place == source])

    def of(self, numbers: np.ndarray, tokens: Tensor) -> dict[str, Tensor]:
        """The stored answers."""
        ends = [self._stack(f"hidden-{tap}", numbers) for tap in self.wanted.taps]
        answers = {"hidden": torch.stack(ends, dim=1)} if ends else {}
        return {**answers, **{name: self._stack(name, numbers) for name in self.wanted.outputs}}

    def ends(self, numbers: np.ndarray, which: Sequence[int]) -> list[Tensor]:
        """Hidden states [B, L, D] of some of the taps alone, by their places among them."""
        return [self._stack(f"hidden-{self.wanted.taps[tap]}", numbers) for tap in which]

    def _is_whole(self, place: tuple[int, int]) -> bool:
        source, row = place
        return all(self.stores[source].get(name, row) is not None for name in self.wanted.names)

    def _stack(self, name: str, numbers: np.ndarray) -> Tensor:
        """One kind of answer for these rows; the parent is asked again for those that have been damaged since."""
        places = [self.corpus.place(int(number)) for number in numbers]
        for _ in range(2):
            found = [self.stores[source].get(name, row) for source, row in places]
            if not any(value is None for value in found):
                return torch.stack([value for value in found if value is not None])
            self.prepare(numbers)
        raise SurgeryError(f"{self.stores[0].folder}: what is written there cannot be read back; check the disk")

    def logits(self, last: Tensor) -> Tensor:
        """From what left the last layer."""
        return self.parent().final(last)

    @torch.no_grad()
    def states(self, last: Tensor) -> Tensor:
        """From what left the last layer."""
        return self.parent().states(last)


class LiveTargets:
    """The parent in memory, run beside the student."""

    def __init__(self, config: dict[str, Any], runner: LayerRunner, wanted: Wanted, dtype: torch.dtype) -> None:
        model = empty_model(config)
        fill(model, runner.weights, dtype, runner.device)
        tapped = TappedModel(model, runner.family.layers, wanted.taps, runner.family.encoder)
        self.model = tapped.requires_grad_(False).eval()
        self.runner, self.wanted = runner, wanted

    def prepare(self, numbers: np.ndarray) -> None:
        """Nothing is computed ahead."""

    @torch.no_grad()
    def of(self, numbers: np.ndarray, tokens: Tensor) -> dict[str, Tensor]:
        """The answers, computed now."""
        if self.wanted.nothing:
            return {}
        ids = tokens.to(self.runner.device)
        ends, states = self.model(ids, **masked(ids, self.runner.padding))
        answers = {"hidden": torch.stack(ends, dim=1)} if ends else {}
        if self.wanted.top_k == 0:
            return answers
        if self.wanted.top_k is None:
            return {**answers, "last": states}
        return {**answers, **_stacked([top_tokens(self.model.logits(row), self.wanted.top_k) for row in states])}

    def logits(self, last: Tensor) -> Tensor:
        """From what left the final norm."""
        return self.model.logits(last)

    def states(self, last: Tensor) -> Tensor:
        """What they are already."""
        return last


@torch.no_grad()
def _answer(
    parent: LayerRunner, tokens: Tensor, wanted: Wanted, batch: int, keep: Callable[[str, int, Tensor], None]
) -> None:
    """What the parent says about these rows [n, L]: keep(name, first row, values [some rows, ...])."""

    def see(layer: int, part: slice, variant: int, mine: Parts, base: Parts) -> None:
        # What enters the first layer goes by the number before it.
        for tap, values in ((layer - 1, mine.entered), (layer, mine.left)):
            if tap in wanted.taps and (tap == layer or layer == 0):
                keep(f"hidden-{tap}", part.start, values.cpu())

    last = walk(parent, tokens, [Variant()], see, batch=batch)[0]
    if wanted.top_k == 0:
        return
    for number, row in enumerate(last):
        if wanted.top_k is None:
            keep("last", number, row[None])
            continue
        top = top_tokens(parent.final(row.to(parent.device)), wanted.top_k)
        keep("top_ids", number, top.ids[None])
        keep("top_log_p", number, top.log_p[None])


def top_tokens(logits: Tensor, k: int) -> TopTokens:
    """The `k` likeliest tokens of each row of logits [L, V]."""
    found, ids = largest(logits, min(k, logits.shape[-1]))
    totals = torch.cat([torch.logsumexp(logits[rows].float(), -1) for rows in compared(logits)])
    return TopTokens(ids.int(), (found.float() - totals[:, None]).half())


def largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`values.topk(k)` of rows [L, V]: (values, places), largest first.

    Columns that are V / GROUP apart are a group. The k largest are in the k groups with the largest maxima: those alone
    are sorted, a third of the time.
    """
    count = values.shape[-1] // GROUP
    if count < k:
        top = values.topk(k)
        return top.values, top.indices
    groups, rest = values[:, : count * GROUP].unflatten(1, (GROUP, count)), values[:, count * GROUP :]
    chosen = groups.amax(1).topk(k).indices[:, None].expand(-1, GROUP, -1)
    places = chosen + count * torch.arange(GROUP, device=values.device)[:, None]
    candidates = torch.cat([groups.gather(2, chosen).flatten(1), rest], 1)
    after = torch.arange(count * GROUP, values.shape[-1], device=values.device).expand(len(values), -1)
    top = candidates.topk(k)
    return top.values, torch.cat([places.flatten(1), after], 1).gather(1, top.indices)


def _stacked(rows: Sequence[TopTokens]) -> dict[str, Tensor]:
    return {"top_ids": torch.stack([row.ids for row in rows]), "top_log_p": torch.stack([row.log_p for row in rows])}


def distribution(answers: dict[str, Tensor], logits: Callable[[Tensor], Tensor]) -> Callable[[slice], Target]:
    """Rows of the flattened batch -> what the parent expects there. `logits` as in `Targets`."""
    if "top_ids" in answers:
        ids, log_p = answers["top_ids"].flatten(0, 1), answers["top_log_p"].flatten(0, 1)
        return lambda rows: TopTokens(ids[rows], log_p[rows])
    last = answers["last"].flatten(0, 1)
    return lambda rows: logits(last[rows])


def _folder(fingerprint: str, data: str, wanted: Wanted) -> Path:
    key = json.dumps([LAYOUT, fingerprint, data, wanted.taps, wanted.top_k])
    return cache_folder("targets") / hashlib.sha256(key.encode()).hexdigest()[:32]
