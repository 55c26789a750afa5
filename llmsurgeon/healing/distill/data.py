"""Training text: read, tokenised and packed once, kept on disk, drawn in an order that follows from the seed.

N rows of L tokens each.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llmsurgeon.boundary.foreign import token_ids
from llmsurgeon.checkpoint.kept import cache_folder, forget, keep, kept, writing
from llmsurgeon.errors import SurgeryError
from llmsurgeon.progress import Progress
from llmsurgeon.text.cache import tokenizer_key
from llmsurgeon.text.documents import dataset_revision, documents
from llmsurgeon.text.files import check_text_file, text_sum
from llmsurgeon.text.self_text import document_start
from llmsurgeon.text.sequences import Sequences
from llmsurgeon.text.wanted import Calibration
from llmsurgeon.text.windows import padded, sentences_of, window_end, window_start

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmsurgeon.operations.distill import Distill

# A row that shares this many tokens in a row with the held-out text is not trained on.
OVERLAP = 24
# What is told of text that the parent wrote.
OWN = "the parent's own text"


@dataclass(frozen=True)
class Rows:
    """Packed text of one source: `tokens` uint32 [N, L], on disk. `key` changes with text, tokenizer and packing.

    own: sampled from the parent, apart from all that judges.
    """

    name: str
    key: str
    tokens: np.ndarray
    weight: float = 1.0
    own: bool = False


def packed(
    texts: Iterable[Iterable[str]], tokenizer: PreTrainedTokenizerBase, length: int, limit: int
) -> Iterator[list[int]]:
    """Rows of `length` tokens: documents (each a sequence of pieces) one after the other, parted by the token that
    texts begin with; every row begins with the tokenizer's own start token where it has one, and an encoder's ends with
    its separator. The last, unfilled row is left out."""
    start, end = window_start(tokenizer), window_end(tokenizer)
    separator = document_start(tokenizer)
    inner, made, pending = length - len(start) - len(end), 0, list[int]()
    if inner < 1:
        raise SurgeryError(f"rows of {length} tokens hold special tokens only; raise distill.sequence_length")
    for pieces in texts:
        if separator is not None:
            pending.append(separator)
        for piece in pieces:
            pending += token_ids(tokenizer, piece, add_special_tokens=False, verbose=False)
            at = 0
            while len(pending) - at >= inner:
                if made + length > limit:
                    return
                yield start + pending[at : at + inner] + end
                at += inner
                made += length
            del pending[:at]  # once a piece: a document may be one piece of millions of tokens


def sentence_rows(
    texts: Iterable[Iterable[str]], tokenizer: PreTrainedTokenizerBase, length: int, limit: int
) -> Iterator[list[int]]:
    """Rows of one sentence each, cut or padded to `length` tokens; padding counts towards `limit`."""
    made = 0
    for pieces in texts:
        for piece in pieces:
            for row in padded(sentences_of(piece), tokenizer, length):
                if made + length > limit:
                    return
                yield row
                made += length


@dataclass(frozen=True)
class Text:
    """A file or a hub dataset, of which at most `limit` tokens are read; sentences: a row is one of them, padded."""

    text: str | None = None
    dataset: str | None = None
    limit: int = 10_000_000
    seed: int = 0
    sentences: bool = False


def read_rows(tokenizer: PreTrainedTokenizerBase, length: int, source: Text) -> Rows:
    """The rows of a file or a hub dataset; read and tokenised only where they are not in the cache yet.

    Raises:
        SurgeryError: the text cannot be read, or does not fill one row.
    """
    text, dataset, limit, seed = source.text, source.dataset, source.limit, source.seed
    name = text or dataset
    assert name is not None
    # The same bytes are other documents under another suffix.
    origin: list[Any] = (
        [check_text_file(text), text_sum(text)] if text else [dataset, dataset_revision(str(dataset)), seed]
    )
    key = _key(*origin, tokenizer_key(tokenizer), length, limit, *(["sentences"] if source.sentences else []))
    path = _folder("tokens") / f"{key}.u32"
    if not kept(path):
        cut = sentence_rows if source.sentences else packed
        rows = cut(documents(text=text, dataset=dataset, seed=seed), tokenizer, length, limit)
        _write(path, rows, length, f"tokenise {name}", limit if dataset else None)
    tokens = _mapped(path, length)
    if not len(tokens) and source.sentences:
        forget(path)
        raise SurgeryError(f"{name}: there is no sentence in it; leave out calibration.sentences, or give prose")
    if not len(tokens):
        forget(path)
        raise SurgeryError(f"{name}: its text does not fill one row of {length} tokens; lower distill.sequence_length")
    return Rows(name, key, tokens)


def rows_of(windows: Tensor, length: int, name: str, weight: float = 1.0) -> Rows:
    """The rows of tokens that are there already, int64 [S, T], cut or joined to `length`."""
    flat = windows[:, : windows.shape[1] // length * length] if windows.shape[1] >= length else windows
    count = flat.numel() // length
    if not count:
        raise SurgeryError(f"{name}: {windows.numel()} tokens do not fill one row of {length}")
    tokens = flat.reshape(-1)[: count * length].reshape(count, length).numpy().astype(np.uint32)
    return Rows(name, _key(hashlib.sha256(tokens.tobytes()).hexdigest(), length), tokens, weight)


def training_rows(
    settings: Distill,
    calibration: Calibration,
    windows: Sequences,
    tokenizer: PreTrainedTokenizerBase,
    sample: Callable[[int, int, int], Tensor],
) -> list[Rows]:
    """The rows to train on, of each of the recipe's sources.

    Args:
        windows: calibration sequences that do not judge [S, T], trained on where calibration is sampled.
        sample: (tokens, length, seed) -> text from the parent [S, length].
    """
    length, seed = settings.sequence_length, settings.seed
    found = []
    for source in settings.sources:
        limits: dict[str, Any] = {"limit": source.tokens, "seed": seed, "sentences": calibration.sentences}
        if source.sampled is not None:
            # Calibration samples with seed 0, eval with 1.
            text = sample(min(source.sampled, source.tokens), length, seed + 2)
            rows = replace(rows_of(text, length, OWN), own=True)
        elif not source.calibration:
            rows = read_rows(tokenizer, length, Text(source.text, source.dataset, **limits))
        else:
            parts = calibration_rows(calibration, windows, tokenizer, length, limits)
            found += [replace(part, weight=part.weight * source.weight) for part in parts]
            continue
        found.append(replace(rows, weight=source.weight))
    return found


def calibration_rows(
    calibration: Calibration,
    windows: Sequences,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    limits: Mapping[str, Any],
) -> list[Rows]:
    """The text that calibration reads: files and datasets whole, and of `windows` what the model wrote, by the weights
    of the sources, which add up to 1."""
    total = sum(source.weight for source in calibration.sources)
    found, written = [], 0.0
    for source in calibration.sources:
        if source.kinds:
            written += source.weight / total
            continue
        rows = read_rows(tokenizer, length, Text(source.text, source.dataset, **limits))
        found.append(replace(rows, weight=source.weight / total))
    own = windows[torch.tensor([kind not in calibration.labels for kind in windows.kinds])].tokens
    # A share beside a short text may be shorter than a row.
    if written and (own.numel() >= length or not found):
        limit = max(1, limits["limit"] // windows.tokens.shape[1])
        found.append(replace(rows_of(own[:limit], length, OWN, written), own=True))
    return found


def without_overlap(rows: Rows, held_out: Tensor, overlap: int = OVERLAP) -> np.ndarray:
    """Numbers of the rows that share no `overlap` tokens in a row with the held-out sequences, int64 [S, T].

    What the parent wrote shares nothing with them but what its chat template puts before every conversation.
    """
    if rows.own:
        return np.arange(len(rows.tokens))
    overlap = min(overlap, held_out.shape[1], rows.tokens.shape[1])
    judged = np.unique(_shingles(held_out.numpy().astype(np.uint64), overlap))
    clean = [
        start + np.flatnonzero(~np.isin(_shingles(part.astype(np.uint64), overlap), judged).any(1))
        for start, part in _parts(rows.tokens)
    ]
    return np.concatenate(clean)


def without_sentences(rows: Rows, held_out: Tensor) -> np.ndarray:
    """Numbers of the rows that are none of the held-out sentences, int64 [S, T], both padded; cut alike to compare."""
    length = min(held_out.shape[1], rows.tokens.shape[1])
    judged = {row.tobytes() for row in held_out[:, :length].numpy().astype(np.uint32)}
    return np.array([i for i, row in enumerate(rows.tokens) if row[:length].tobytes() not in judged], np.int64)


def _parts(tokens: np.ndarray, rows: int = 4096) -> Iterator[tuple[int, np.ndarray]]:
    return ((start, np.asarray(tokens[start : start + rows])) for start in range(0, len(tokens), rows))


def _shingles(tokens: np.ndarray, width: int) -> np.ndarray:
    """A hash of each `width` neighbouring tokens [N, L - width + 1]: a polynomial modulo 2^64."""
    length = tokens.shape[1] - width + 1
    hashes = np.zeros((len(tokens), length), np.uint64)
    for offset in range(width):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + tokens[:, offset : offset + length] + np.uint64(1)
    return hashes


@dataclass
class Corpus:
    """Sources side by side, and the order in which their rows are trained on.

    The next row comes from the source that is furthest behind its weight; within a source every row is drawn once
    before any is drawn again. Rows are numbered through all sources.

    allowed: for each source the numbers of the rows that may be drawn.
    drawn: how many rows were drawn from each source: all that the order depends on, beside the seed.
    """

    sources: Sequence[Rows]
    allowed: Sequence[np.ndarray]
    seed: int
    drawn: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        for rows, allowed in zip(self.sources, self.allowed, strict=True):
            if not len(allowed):
                raise SurgeryError(
                    f"{rows.name}: nothing is left to train on: every row shares text with the held-out sequences; "
                    "give more text, or other text to one of them"
                )
        self.drawn = self.drawn or [0] * len(self.sources)
        self.starts = np.cumsum([0, *(len(rows.tokens) for rows in self.sources)])
        total = sum(rows.weight for rows in self.sources)
        self._shares = [rows.weight / total for rows in self.sources]
        self._shuffled: dict[tuple[int, int], np.ndarray] = {}

    @property
    def tokens_a_pass(self) -> int:
        """Tokens that are there to train on."""
        return sum(len(a) * rows.tokens.shape[1] for a, rows in zip(self.allowed, self.sources, strict=True))

    def draw(self, count: int) -> np.ndarray:
        """The next `count` row numbers."""
        return np.array([self._next() for _ in range(count)], np.int64)

    def upcoming(self, count: int) -> np.ndarray:
        """What `draw` would give."""
        return Corpus(self.sources, self.allowed, self.seed, list(self.drawn)).draw(count)

    def _next(self) -> int:
        total = sum(self.drawn) + 1
        behind = [share * total - drawn for share, drawn in zip(self._shares, self.drawn, strict=True)]
        source = behind.index(max(behind))
        turn, place = divmod(self.drawn[source], len(self.allowed[source]))
        self.drawn[source] += 1
        return int(self.starts[source] + self.allowed[source][self._order(source, turn)[place]])

    def _order(self, source: int, turn: int) -> np.ndarray:
        if (source, turn) not in self._shuffled:
            self._shuffled = {key: order for key, order in self._shuffled.items() if key[0] != source}
            rng = np.random.default_rng([self.seed, source, turn])
            self._shuffled[source, turn] = rng.permutation(len(self.allowed[source]))
        return self._shuffled[source, turn]

    def place(self, row: int) -> tuple[int, int]:
        """(source, row within it)."""
        source = int(np.searchsorted(self.starts, row, side="right")) - 1
        return source, int(row - self.starts[source])

    def tokens(self, numbers: np.ndarray) -> Tensor:
        """int64 [len(numbers), L]."""
        found = [self.sources[source].tokens[row] for source, row in map(self.place, numbers)]
        return torch.from_numpy(np.stack(found).astype(np.int64))


def _folder(kind: str) -> Path:
    folder = cache_folder(kind)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SurgeryError(f"{folder}: cannot be made: {error.strerror}; set LLMSURGEON_CACHE to a folder") from error
    return folder


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _write(path: Path, rows: Iterable[list[int]], length: int, what: str, limit: int | None) -> None:
    """Write rows as they come; the file has its name only when all of it is there."""

    def write(partial: Path) -> None:
        with partial.open("wb") as file, Progress(what, limit, "tokens") as progress:
            for row in rows:
                with writing(path, then="set LLMSURGEON_CACHE to a folder with room"):
                    file.write(np.array(row, np.uint32).tobytes())
                progress.advance(length)

    keep(path, write)


def _mapped(path: Path, length: int) -> np.ndarray:
    count = path.stat().st_size // (4 * length)
    return np.memmap(path, np.uint32, "r", shape=(count, length)) if count else np.empty((0, length), np.uint32)
