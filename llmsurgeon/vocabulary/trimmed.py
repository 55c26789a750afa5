"""A checkpoint with a smaller vocabulary, as any other checkpoint: rows gathered, ids moved, tokenizer rewritten.

Everything after it (closed-form updates, training, measuring, writing, export) sees a model that never had the other
tokens. Its next-token distribution is the parent's, renormalised over the tokens that stayed, since a softmax over
fewer logits is just that.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsurgeon.boundary.foreign import read_json
from llmsurgeon.checkpoint.companions import Companions, companions_of
from llmsurgeon.checkpoint.files import refuse_huge_ids
from llmsurgeon.checkpoint.passing import passing_folder
from llmsurgeon.checkpoint.source import Checkpoint
from llmsurgeon.checkpoint.tokenizer_json import tokens_of
from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats.configs import normalised
from llmsurgeon.formats.models import empty_model, expected_shapes
from llmsurgeon.formats.reading import read_model
from llmsurgeon.formats.towers import tower_of
from llmsurgeon.vocabulary.ids import moved_ids, named_ids
from llmsurgeon.vocabulary.keep import Vocabulary, Wish, chosen, count_tokens, listed_tokens, same_tokens
from llmsurgeon.vocabulary.likely import Expected, likely_tokens
from llmsurgeon.vocabulary.tokenizer_files import REWRITTEN, TOKENIZER, read_description, with_ids, write_trimmed

# Config keys that hold the size of the table.
SIZE_KEYS = ("vocab_size",)


@dataclass(frozen=True)
class Source:
    """Tokens that are to stay.

    documents: texts whose tokens stay if they occur at least `min_count` times, or, where `tokens` is given, the so
        many most frequent ones. counts: how often tokens occur in texts that were counted already.
    tokens: without documents, the so many first of the vocabulary.
    file: a list of tokens.
    """

    documents: Iterable[Iterable[str]] | None = None
    min_count: int = 1
    tokens: int | None = None
    file: Path | None = None
    counts: Mapping[int, int] | None = None


def small_files(checkpoint: Checkpoint) -> dict[str, Path]:
    """The checkpoint's files beside config and weights: name inside the folder -> path."""
    return {
        (path.relative_to(checkpoint.path).as_posix() if path.is_relative_to(checkpoint.path) else path.name): path
        for path in checkpoint.tokenizer_files()
    }


def trim(
    checkpoint: Checkpoint,
    sources: Iterable[Source],
    *,
    rows: int | None = None,
    multiple_of: int = 64,
    expected: Expected | None = None,
) -> TrimmedCheckpoint:
    """`checkpoint` with the tokens that `sources` ask for and what must stay beside them.

    expected: how often a model expects tokens in the sources' texts; the tokens that are likely by that fill up `rows`
        after those that occur there.

    Raises:
        SurgeryError: its tokenizer cannot be trimmed, more must stay than `rows`, or nothing would go.
    """
    from tokenizers import Tokenizer

    checkpoint.companions.check_tokenizer(checkpoint.name, checkpoint.path)
    files = small_files(checkpoint)
    description = read_description(files, checkpoint.name)
    refuse_huge_ids(files[TOKENIZER])
    tokenizer = Tokenizer.from_file(str(files[TOKENIZER]))
    size = _rows(checkpoint)
    wish = Wish()
    known = tokenizer.get_vocab(with_added_tokens=True)
    for source in sources:
        if source.documents is not None or source.counts is not None:
            counts = Counter(source.counts) + count_tokens(tokenizer, source.documents or ())
            wish.counts.update(counts)
            frequent = sorted(counts, key=lambda i: (-counts[i], i))
            enough = (i for i in frequent if counts[i] >= source.min_count)
            wish.ids |= set(list(enough)[: source.tokens])
        elif source.file is not None:
            wish.ids |= listed_tokens(source.file, known, size)
        else:
            wish.ids |= set(sorted(tokens_of(description["model"]).values())[: source.tokens])
    if expected is not None:
        wish.expected = likely_tokens(tokens_of(description["model"]), wish.counts, expected)
    wish.fixed |= _fixed(checkpoint, files)
    vocabulary = chosen(description, wish, size, rows=rows, multiple_of=multiple_of, where=checkpoint.name)
    return TrimmedCheckpoint(checkpoint, vocabulary, description, files)


def least_rows(checkpoint: Checkpoint) -> int:
    """How many rows stay whatever is asked for: added tokens, what any text can be written with, ids that are named.

    Raises:
        SurgeryError: its tokenizer cannot be trimmed.
    """
    files = small_files(checkpoint)
    checkpoint.companions.check_tokenizer(checkpoint.name, checkpoint.path)
    description = read_description(files, checkpoint.name)
    refuse_huge_ids(files[TOKENIZER])
    wish = Wish(fixed=_fixed(checkpoint, files))
    return len(chosen(description, wish, _rows(checkpoint), multiple_of=1, where=checkpoint.name).kept)


def _fixed(checkpoint: Checkpoint, files: Mapping[str, Path]) -> set[int]:
    """Ids that config.json and the files beside it name."""
    return named_ids(checkpoint.config).union(*(_ids_in(name, path) for name, path in files.items()))


def trimmed_like(student: Checkpoint, parent: Checkpoint) -> TrimmedCheckpoint:
    """`parent` with the tokens of `student`, whose vocabulary was trimmed, in the student's order.

    Raises:
        SurgeryError: the student has rows that are no tokens of the parent.
    """
    files = small_files(parent)
    description = read_description(files, parent.name)
    theirs = _numbered(description)
    mine = _numbered(read_description(small_files(student), student.name))
    kept = same_tokens(mine, theirs, _rows(student), f"{student.name} is not cut from {parent.name}")
    vocabulary = Vocabulary(tuple(kept), _rows(parent), len(kept))
    return TrimmedCheckpoint(parent, vocabulary, description, files)


def _numbered(description: Mapping[str, Any]) -> dict[str, int]:
    """Token -> id, added ones included."""
    added = {entry["content"]: entry["id"] for entry in description.get("added_tokens") or ()}
    return tokens_of(description["model"]) | added


def _ids_in(name: str, path: Path) -> set[int]:
    """Ids that a JSON file beside the weights names, under the keys under which they are moved."""
    if REWRITTEN.get(name) is not with_ids:
        return set()
    return named_ids(read_json(path))


def _rows(checkpoint: Checkpoint) -> int:
    tower = tower_of(checkpoint.config, checkpoint)
    config = normalised(tower.text if tower else checkpoint.config)
    return int(config["vocab_size"])


class TrimmedCheckpoint(Checkpoint):
    """`base` with the rows of `vocabulary` alone.

    Attributes:
        vocabulary: which rows stayed.
        left_out: files that hold the vocabulary in a form that is not rewritten.
    """

    def __init__(
        self, base: Checkpoint, vocabulary: Vocabulary, description: dict[str, Any], files: Mapping[str, Path]
    ) -> None:
        self.base, self.vocabulary, self.name = base, vocabulary, base.name
        self.stamps = base.stamps
        folder = passing_folder(self)
        self.path = folder
        self.left_out = write_trimmed(files, description, vocabulary, folder)
        self.trust_remote_code = base.trust_remote_code
        self.config = self._moved_config()
        # Tokenizers are loaded by the config beside them.
        (folder / "config.json").write_text(json.dumps(self.config), encoding="utf-8")
        self._gathered = self._tables()
        self._rows = torch.tensor(vocabulary.kept)
        kept = ",".join(map(str, vocabulary.kept))
        self.fingerprint = sha256(f"{base.fingerprint} {kept}".encode()).hexdigest()
        self.content = sha256(f"{base.content} {kept}".encode()).hexdigest()

    def own_tokenizer_files(self) -> list[Path]:
        return self.base.own_tokenizer_files()

    def _moved_config(self) -> dict[str, Any]:
        size = len(self.vocabulary.kept)

        def resized(config: Any) -> Any:
            if not isinstance(config, dict):
                return config
            return {
                key: size if key in SIZE_KEYS and value == self.vocabulary.size else resized(value)
                for key, value in config.items()
            }

        made: dict[str, Any] = moved_ids(resized(self.base.config), self.vocabulary.moved)
        tower = tower_of(made, self.base)
        if normalised(tower.text if tower else made)["vocab_size"] != size:
            # The config left it to its class to say how many there are.
            made["vocab_size"] = size
        return made

    def _tables(self) -> frozenset[str]:
        """Names in the file of all tensors with a row a token: those that a smaller vocabulary makes smaller."""
        size, rows = self.vocabulary.size, len(self.vocabulary.kept)
        read = read_model(self.base)
        # With its ids moved: a model has no padding token beyond its table.
        smaller = {**moved_ids(read.config, self.vocabulary.moved), "vocab_size": rows}
        old, new = expected_shapes(empty_model(read.config)), expected_shapes(empty_model(smaller))
        changed = {name for name in old if old[name] != new[name]}
        for name in changed:
            if old[name] != (size, *new[name][1:]):
                raise SurgeryError(
                    f"{self.name}: {name} of shape {list(old[name])} would become {list(new[name])}; only tables with "
                    "a row a token can be trimmed"
                )
        own = {name: read.weights.origin(name) for name in read.weights}
        # Copies of tied tensors, which nothing reads, stay copies.
        copies = {name for name in set(self.base) - set(own.values()) if self.base.shape(name)[:1] == (size,)}
        return frozenset(origin for name in changed if (origin := own[name]) is not None) | copies

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.base[name]
        return tensor.index_select(0, self._rows) if name in self._gathered else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)

    def __contains__(self, name: object) -> bool:
        return name in self.base

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self.base.shape(name)
        return (len(self.vocabulary.kept), *shape[1:]) if name in self._gathered else shape

    def dtype(self, name: str) -> torch.dtype:
        return self.base.dtype(name)

    def location(self, name: str) -> tuple[Path, int, int] | None:
        return None if name in self._gathered else self.base.location(name)

    @property
    def card(self) -> Mapping[str, Any]:
        return self.base.card

    @cached_property
    def companions(self) -> Companions:
        """Those of the base, rewritten."""
        return replace(companions_of(self.path, self.trust_remote_code), notes=self.base.companions.notes)
