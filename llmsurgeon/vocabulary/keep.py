"""Which tokens stay: those of texts and lists, what must stay beside them, and what fills the table up."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmsurgeon.checkpoint.tokenizer_json import tokens_of
from llmsurgeon.errors import SurgeryError
from llmsurgeon.vocabulary.closure import closed, kind_of, trees_of

# Pieces of a text that are encoded side by side.
SIDE_BY_SIDE = 64


@dataclass(frozen=True)
class Vocabulary:
    """The rows of the parent's table that stay, `kept` in rising order, of `size`.

    wanted: how many were asked for; the others must stay beside them or fill the table up.
    """

    kept: tuple[int, ...]
    size: int
    wanted: int

    @property
    def moved(self) -> dict[int, int]:
        """Parent's id -> new id."""
        return {old: new for new, old in enumerate(self.kept)}


@dataclass
class Wish:
    """What was asked for: ids that stay, and how often tokens occur in the texts (they fill up first).

    expected: how likely other tokens are in such texts, more for likelier ones (they fill up next).
    fixed: further ids that must stay, such as those that configs name; added tokens always do.
    """

    ids: set[int] = field(default_factory=set)
    counts: Counter[int] = field(default_factory=Counter)
    expected: Mapping[int, float] = field(default_factory=dict)
    fixed: set[int] = field(default_factory=set)


def count_tokens(tokenizer: Any, documents: Iterable[Iterable[str]]) -> Counter[int]:
    """How often each id occurs in documents, each given as pieces that follow one another.

    A piece after the first is encoded behind the last line before it, so that its first words are cut as in the text;
    what that counts twice is a line a piece.
    """
    counts: Counter[int] = Counter()
    for batch in _batches(_with_overlap(documents), SIDE_BY_SIDE):
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            counts.update(encoding.ids)
    return counts


def _with_overlap(documents: Iterable[Iterable[str]]) -> Iterator[str]:
    for document in documents:
        line = ""
        for piece in document:
            yield line + piece
            line = piece.splitlines(keepends=True)[-1] if piece else line


def _batches(texts: Iterator[str], size: int) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def listed_tokens(path: Path, known: Mapping[str, int], size: int) -> set[int]:
    """Ids of the tokens in a file: a JSON list of tokens or ids, or one token a line as tokenizer.json spells it.

    Raises:
        SurgeryError: no such file, nothing in it, or a token that the vocabulary does not have; it is named.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise SurgeryError(f"{path}: the list of tokens cannot be read ({reason})") from error
    entries: Any
    if path.suffix.lower() == ".json":
        try:
            entries = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SurgeryError(f"{path}: not JSON ({error})") from error
        if not isinstance(entries, list) or not all(type(entry) in (str, int) for entry in entries):
            raise SurgeryError(f"{path}: expected a JSON list of tokens (texts) or ids (numbers)")
    else:
        entries = [line for line in text.split("\n") if line]
        entries = [entry.removesuffix("\r") for entry in entries]
    if not entries:
        raise SurgeryError(f"{path}: the list of tokens is empty")
    ids = {entry if isinstance(entry, int) else known.get(entry, -1) for entry in entries}
    unknown = [e for e in entries if (e not in known if isinstance(e, str) else not 0 <= e < size)]
    if unknown:
        raise SurgeryError(
            f"{path}: {len(unknown)} of its {len(entries)} entries are not in the vocabulary, {unknown[0]!r} the "
            "first; tokens are spelled as in tokenizer.json (a space before a word is Ġ or ▁)"
        )
    return ids


def same_tokens(mine: Mapping[str, int], theirs: Mapping[str, int], rows: int, problem: str) -> list[int]:
    """The parent's id of each of a trimmed model's `rows`, by the tokens' names.

    Raises:
        SurgeryError: `problem`, and a row that has no token of the parent's.
    """
    named = {i: token for token, i in mine.items()}
    missing = [i for i in range(rows) if named.get(i) not in theirs]
    if missing:
        token = named.get(missing[0])
        which = f"token {token!r}" if token is not None else f"row {missing[0]}, which has no token,"
        raise SurgeryError(
            f"{problem}: {len(missing):,} of its {rows:,} tokens are not the parent's, {which} the first"
        )
    return [theirs[named[i]] for i in range(rows)]


def chosen(
    description: Mapping[str, Any],
    wish: Wish,
    size: int,
    *,
    rows: int | None = None,
    multiple_of: int = 64,
    where: str = "the tokenizer",
) -> Vocabulary:
    """The rows that stay of a table of `size`.

    Args:
        description: a tokenizer.json.
        wish: what was asked for.
        rows: how many rows there are to be; None: as few as a multiple of `multiple_of` allows. What is missing is
            filled up by tokens that occur in the texts, most frequent first, then by those most expected there, then
            by the first of the parent's.

    Raises:
        SurgeryError: more must stay than `rows`, nothing would go, or a tokenizer that cannot be trimmed.
    """
    model = description["model"]
    kind_of(model, where)
    own = set(tokens_of(model).values())
    added = {entry["id"] for entry in description.get("added_tokens") or ()}
    asked = {i for i in wish.ids if i < size}
    needed = {i for i in asked | added | wish.fixed if i < size}
    trees = trees_of(model)
    kept = {i for i in closed(model, needed & own, where, trees) if i < size} | needed
    goal = rows if rows is not None else min(size, -(-len(kept) // multiple_of) * multiple_of)
    if goal < len(kept):
        raise SurgeryError(
            f"{where}: {len(asked):,} tokens were asked for, and with what must stay beside them (bytes or characters, "
            f"the parts that make them, added tokens) that is {len(kept):,} rows, more than {goal:,}; ask for at least "
            f"{len(kept):,}, or for fewer tokens (min_count)"
        )
    if goal > size:
        raise SurgeryError(f"{where}: {goal:,} rows were asked for, and the model has {size:,}; ask for fewer")
    if goal == size:
        raise SurgeryError(f"{where}: all {size:,} rows would stay; ask for fewer tokens")
    for i in (*_ranked(wish.counts), *_ranked(wish.expected), *sorted(own), *range(size)):
        if len(kept) == goal:
            break
        if i in kept or i >= size:
            continue
        more = trees(i) if i in own else {i}
        if len(kept) + len(more - kept) <= goal:
            kept |= more
    return Vocabulary(tuple(sorted(kept)), size, len(asked))


def _ranked(counts: Mapping[int, float]) -> list[int]:
    """Ids by falling count."""
    return [i for i, _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))]
