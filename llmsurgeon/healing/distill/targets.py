"""What the parent says about the training text: hidden states at block ends and next-token distributions.

`StoredTargets` walks the parent layer by layer over rows that are about to be needed, once, and keeps the answers on
disk: the parent may be larger than memory, and a second pass over the text costs nothing. `LiveTargets` keeps the
parent in memory and runs it beside the student, for text that is seen once.

N rows of L tokens, D model width, E block ends ("taps"), K tokens kept of each distribution.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from llmsurgeon.checkpoint.kept import unfinished, writing
from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats.models import empty_model, fill
from llmsurgeon.healing.distill.data import Corpus
from llmsurgeon.healing.distill.losses import Target, TopTokens
from llmsurgeon.progress import remark
from llmsurgeon.text.self_text import cache_folder
from llmsurgeon.walk.runner import LayerRunner
from llmsurgeon.walk.variants import Variant
from llmsurgeon.walk.walk import Parts, walk

# Rows for which the parent is run at a time. A resumed run meets the same groups of rows, so that its targets are the
# same to the last bit.
AHEAD = 64
# Changes with the form of the files.
LAYOUT = 2


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
        self.stores = [_Store(_folder(fingerprint, rows.key, wanted), len(rows.tokens)) for rows in corpus.sources]

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
    from llmsurgeon.walk.runner import Given

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
    """One file for each kind of answer, by row, each row with its checksum; and one byte a row that says whether all of
    its answers are there.

    Rows are written and read by calls, not through a memory map, where a full disk or a file cut short is a signal that
    ends the process. Rows that were never written take no room.
    """

    def __init__(self, folder: Path, rows: int) -> None:
        self.folder = folder
        self.files: dict[str, _Rows] = {}
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
            self._known = os.open(folder / "known", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            weakref.finalize(self, os.close, self._known)
            self._flags = np.zeros(rows, np.uint8)
            noted = np.frombuffer(os.pread(self._known, rows, 0), np.uint8)
            self._flags[: len(noted)] = noted

    def _writing(self) -> AbstractContextManager[None]:
        return writing(self.folder, then="set LLMSURGEON_CACHE to a folder with room")

    def known(self, row: int) -> bool:
        return bool(self._flags[row])

    def put(self, name: str, row: int, value: Tensor) -> None:
        with self._writing():
            if name not in self.files:
                self.files[name] = _Rows.made(self.folder / name, tuple(value.shape), value.dtype)
            self.files[name].write(row, value)

    def know(self, rows: list[int]) -> None:
        """All at once: a kill before this makes a later run compute the same group of rows again."""
        self._flags[rows] = 1
        with self._writing():
            for row in rows:
                os.pwrite(self._known, b"\1", row)

    def get(self, name: str, row: int) -> Tensor | None:
        """The answer as it was put, None where it is not there or not whole."""
        if name not in self.files:
            found = _Rows.found(self.folder / name)
            if found is None:
                return None
            self.files[name] = found
        return self.files[name].read(row)


class _Rows:
    """A file of rows of one shape and dtype, each followed by four bytes of checksum."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self.size = prod(shape) * dtype.itemsize
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        weakref.finalize(self, os.close, self.fd)

    @classmethod
    def made(cls, path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> _Rows:
        """The file, its shape noted beside it."""
        note = path.with_name(f"{path.name}.json")
        with unfinished(note) as partial:
            partial.write_text(json.dumps({"shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}))
            partial.replace(note)
        return cls(path, shape, dtype)

    @classmethod
    def found(cls, path: Path) -> _Rows | None:
        """The file as its note describes it, None where either is not there."""
        try:
            noted = json.loads(path.with_name(f"{path.name}.json").read_text())
            shape, dtype = tuple(noted["shape"]), getattr(torch, noted["dtype"])
            return cls(path, shape, dtype) if path.is_file() else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def write(self, row: int, value: Tensor) -> None:
        data = value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        record = memoryview(data + zlib.crc32(data).to_bytes(CHECKSUM, "little"))
        at = row * len(record)
        while record:
            count = os.pwrite(self.fd, record, at)
            record, at = record[count:], at + count

    def read(self, row: int) -> Tensor | None:
        length = self.size + CHECKSUM
        record = bytearray(os.pread(self.fd, length, row * length))
        data = memoryview(record)[: self.size]
        if len(record) < length or zlib.crc32(data) != int.from_bytes(record[self.size :], "little"):
            return None
        return torch.frombuffer(record, dtype=self.dtype, count=prod(self.shape)).view(self.shape)


CHECKSUM = 4


def _folder(fingerprint: str, data: str, wanted: Wanted) -> Path:
    key = json.dumps([LAYOUT, fingerprint, data, wanted.taps, wanted.top_k])
    return cache_folder().parent / "targets" / hashlib.sha256(key.encode()).hexdigest()[:32]
