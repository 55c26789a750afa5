"""What the parent says about the training text: hidden states at block ends and next-token distributions.

`StoredTargets` walks the parent layer by layer over rows that are about to be needed, once, and keeps the answers on
disk: the parent may be larger than memory, and a second pass over the text costs nothing. `LiveTargets` keeps the
parent in memory and runs it beside the student, for text that is seen once.

N rows of L tokens, D model width, E block ends ("taps"), K tokens kept of each distribution.
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
from torch import Tensor, nn

from llmsurgeon.analysis.self_text import cache_folder
from llmsurgeon.analysis.walk import LayerRunner, Parts, Variant, walk
from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats.models import empty_model, fill
from llmsurgeon.healing.data import Corpus
from llmsurgeon.healing.losses import Target, TopTokens

# Rows for which the parent is run at a time. A resumed run meets the same groups of rows, so that its targets are the
# same to the last bit.
AHEAD = 64


@dataclass(frozen=True)
class Wanted:
    """Which answers the losses need.

    taps: parent layers whose output is wanted; -1 for what enters the first.
    top_k: how many tokens of each distribution; None for all of it, 0 for none.
    """

    taps: tuple[int, ...]
    top_k: int | None

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
        fingerprint: of the parent's weights; with the data's key and what is wanted it names the files.
        batch: rows that go through a layer together.
    """

    def __init__(
        self, corpus: Corpus, parent: Callable[[], LayerRunner], fingerprint: str, wanted: Wanted, batch: int
    ) -> None:
        self.corpus, self.parent, self.wanted, self.batch = corpus, parent, wanted, batch
        self.stores = [_Store(_folder(fingerprint, rows.key, wanted), len(rows.tokens)) for rows in corpus.sources]

    def prepare(self, numbers: np.ndarray) -> None:
        """Run the parent over the rows whose answers are not there yet, each of its layers once."""
        if self.wanted.nothing:
            return
        places = [self.corpus.place(int(number)) for number in numbers]
        todo = [i for i, (source, row) in enumerate(places) if not self.stores[source].known(row)]
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
        places = [self.corpus.place(int(number)) for number in numbers]
        answers = {}
        if self.wanted.taps:
            ends = [self._stack(f"hidden-{tap}", places) for tap in self.wanted.taps]
            answers["hidden"] = torch.stack(ends, dim=1)
        names = () if self.wanted.top_k == 0 else ("last",) if self.wanted.top_k is None else ("top_ids", "top_log_p")
        return {**answers, **{name: self._stack(name, places) for name in names}}

    def ends(self, numbers: np.ndarray, which: Sequence[int]) -> list[Tensor]:
        """Hidden states [B, L, D] of some of the taps alone, by their places among them."""
        places = [self.corpus.place(int(number)) for number in numbers]
        return [self._stack(f"hidden-{self.wanted.taps[tap]}", places) for tap in which]

    def _stack(self, name: str, places: list[tuple[int, int]]) -> Tensor:
        return torch.stack([self.stores[source].get(name, row) for source, row in places])

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


def masked(ids: Tensor, padding: int | None) -> dict[str, Tensor]:
    """What a model is to be told of padding in `ids`."""
    return {} if padding is None else {"attention_mask": (ids != padding).long()}


class TappedModel(nn.Module):
    """A language model that also gives the hidden states behind some of its layers.

    Calling it with ids [B, L] gives ([B, L, D] for each tap, last hidden states [B, L, D], final norm included).
    """

    def __init__(self, model: Any, layers: str, taps: Sequence[int], encoder: bool = False) -> None:
        super().__init__()
        self.model = model
        self._given: dict[str, Any] = {} if encoder else {"use_cache": False}
        self._seen: dict[int, Tensor] = {}
        self.taps = tuple(taps)
        blocks = model.get_submodule(layers)
        for tap in self.taps:
            blocks[tap].register_forward_hook(self._see(tap))

    def _see(self, tap: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            # Gradient checkpointing calls a layer again on the way back: the first output is the one in the graph.
            self._seen.setdefault(tap, output[0] if isinstance(output, tuple) else output)

        return hook

    def forward(self, ids: Tensor, **kwargs: Any) -> tuple[list[Tensor], Tensor]:
        """Hidden states behind the taps, and behind the final norm; `kwargs` are for the model's body."""
        self._seen.clear()
        states = self.model.base_model(input_ids=ids, **self._given, **kwargs).last_hidden_state
        ends = [self._seen[tap] for tap in self.taps]
        return ends, states

    def logits(self, states_TD: Tensor) -> Tensor:
        """The head, as the model's own class computes it: last hidden states [T, D] -> logits [T, V]."""
        return head_logits(self.model, states_TD)


def head_logits(model: Any, states_TD: Tensor) -> Tensor:
    """Last hidden states [T, D] (final norm included) -> logits [T, V], scaled and capped as the model's class does."""
    from llmsurgeon.analysis.walk import Given

    body = model.base_model
    setattr(model, model.base_model_prefix, Given())
    try:
        logits: Tensor = model(inputs_embeds=states_TD[None]).logits[0]
    finally:
        setattr(model, model.base_model_prefix, body)
    return logits


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
    found, ids = logits.topk(min(k, logits.shape[-1]))
    totals = torch.cat([torch.logsumexp(part.float(), -1) for part in logits.split(256)])
    return TopTokens(ids.int(), (found.float() - totals[:, None]).half())


def _stacked(rows: Sequence[TopTokens]) -> dict[str, Tensor]:
    return {"top_ids": torch.stack([row.ids for row in rows]), "top_log_p": torch.stack([row.log_p for row in rows])}


def distribution(answers: dict[str, Tensor], logits: Callable[[Tensor], Tensor]) -> Callable[[slice], Target]:
    """Rows of the flattened batch -> what the parent expects there. `logits` as in `Targets`."""
    if "top_ids" in answers:
        ids, log_p = answers["top_ids"].flatten(0, 1), answers["top_log_p"].flatten(0, 1)
        return lambda rows: TopTokens(ids[rows], log_p[rows])
    last = answers["last"].flatten(0, 1)
    return lambda rows: logits(last[rows])


class _Store:
    """One file for each kind of answer, by row, and one byte a row that says whether it is there."""

    def __init__(self, folder: Path, rows: int) -> None:
        self.folder, self.rows = folder, rows
        self.files: dict[str, Tensor] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._flags = _file(folder / "known", (rows,), torch.uint8)
        except OSError as error:
            raise SurgeryError(f"{folder}: {error.strerror}; set LLMSURGEON_CACHE to a folder with room") from error

    def known(self, row: int) -> bool:
        return bool(self._flags[row])

    def put(self, name: str, row: int, value: Tensor) -> None:
        if name not in self.files:
            shape = {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
            partial = self.folder / f"{name}.json.partial"
            partial.write_text(json.dumps(shape))
            partial.replace(self.folder / f"{name}.json")
            self._open(name)
        self.files[name][row] = value

    def know(self, rows: list[int]) -> None:
        """All at once: a kill before this makes a later run compute the same group of rows again."""
        self._flags[rows] = 1

    def get(self, name: str, row: int) -> Tensor:
        if name not in self.files:
            self._open(name)
        return self.files[name][row]

    def _open(self, name: str) -> None:
        shape = json.loads((self.folder / f"{name}.json").read_text())
        self.files[name] = _file(self.folder / name, (self.rows, *shape["shape"]), getattr(torch, shape["dtype"]))


def _file(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor that is a file; blocks of it that were never written take no room."""
    numbers = int(np.prod(shape))
    with path.open("ab") as file:
        if file.tell() < numbers * dtype.itemsize:
            file.truncate(numbers * dtype.itemsize)
    return torch.from_file(str(path), shared=True, size=numbers, dtype=dtype).view(shape)


def _folder(fingerprint: str, data: str, wanted: Wanted) -> Path:
    key = json.dumps([fingerprint, data, wanted.taps, wanted.top_k])
    return cache_folder().parent / "targets" / hashlib.sha256(key.encode()).hexdigest()[:32]
