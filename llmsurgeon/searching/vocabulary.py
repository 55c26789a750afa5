"""Smaller vocabularies in a search: which tokens stay, and what a text costs when it is cut by them.

A model with fewer rows is the parent on other tokens, and its logits are the parent's at the rows that stayed. So no
checkpoint is made to score it: the text is cut by its tokenizer, the parent reads the tokens under its own ids, and the
rows that stayed share the probability. Vocabularies meet in what they say of the same bytes, counted in nats a token of
the parent's:

    lost  = (nats of the bytes, by the parent with these rows - nats of them, by the parent) / parent's tokens of them
    model = lost + KL(parent with these rows || model) a token * tokens of this vocabulary / parent's tokens

Which tokens stay is told by text that neither scores nor judges.

Shapes: S sequences, T tokens, D model width.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmsurgeon.evaluation.bits_per_byte import cut, texts_of
from llmsurgeon.formats.loading import load_tokenizer
from llmsurgeon.operations.base import HELD_OUT
from llmsurgeon.planning.texts import Texts
from llmsurgeon.progress import track
from llmsurgeon.searching.ground import Ground, Reading
from llmsurgeon.text.documents import documents
from llmsurgeon.text.sequences import held_out
from llmsurgeon.text.wanted import Source as TextSource
from llmsurgeon.text.windows import window_start
from llmsurgeon.vocabulary.keep import count_tokens
from llmsurgeon.vocabulary.likely import Expected
from llmsurgeon.vocabulary.trimmed import Source, trim

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of a file, so much at most is counted to tell which tokens stay.
MOST_CHARACTERS = 1 << 25


@dataclass(frozen=True)
class Pieces:
    """A text in the tokens of some vocabulary, under the parent's ids.

    tokens: [S, T], filled up at the end; lengths: of what is not filling, [S].
    begins: of each token the character at which it begins, -1 where it begins inside one or is not of the text.
    """

    tokens: Tensor
    lengths: Tensor
    begins: tuple[tuple[int, ...], ...]

    @classmethod
    def of(
        cls, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, ids: Sequence[int] | None = None
    ) -> Pieces:
        """The first `length` tokens of each text; `ids` are the parent's of the tokenizer's, by number."""
        start = window_start(tokenizer)
        rows, begins = [], []
        for text in texts:
            mine, where = cut(text, tokenizer)
            row = [*start, *mine][:length]
            rows.append(row if ids is None else [ids[token] for token in row])
            begins.append((*([-1] * len(start)), *where)[:length])
        filled = torch.tensor([[*row, *([0] * (length - len(row)))] for row in rows])
        return cls(filled, torch.tensor(list(map(len, rows))), tuple(begins))

    def places(self, row: int) -> dict[int, int]:
        """Character -> the token of sequence `row` that begins there, of those that something was read before."""
        return {begin: place for place, begin in enumerate(self.begins[row]) if begin >= 0 and place}


@dataclass
class Vocabularies:
    """The vocabularies of a search: each is cut out, and read by the parent, when it is first asked for."""

    texts: Texts
    ground: Ground

    def __post_init__(self) -> None:
        self._kept: dict[int, tuple[tuple[int, ...], PreTrainedTokenizerBase]] = {}
        self._readings: dict[int, Reading] = {}

    def reading(self, rows: int) -> Reading:
        """The scoring text as the vocabulary of so many rows cuts it.

        Raises:
            SurgeryError: the tokenizer cannot be trimmed so far.
        """
        if rows not in self._readings:
            self._readings[rows] = self._read(rows)
        return self._readings[rows]

    def listed(self, rows: int) -> str:
        """The tokens that stay, as a JSON list that `trim_vocab` takes: by name, or by number where they have none."""
        names = {i: name for name, i in self._tokenizer.get_vocab(with_added_tokens=True).items()}
        kept, _ = self._trimmed(rows)
        lines = (json.dumps(names.get(i, i), ensure_ascii=False) for i in kept)
        return "[\n" + ",\n".join(lines) + "\n]\n"

    def _trimmed(self, rows: int) -> tuple[tuple[int, ...], PreTrainedTokenizerBase]:
        """The parent's ids that stay, and the tokenizer that knows them."""
        if rows not in self._kept:
            checkpoint = self.texts.parent.checkpoint
            source = Source(counts=self._counts, tokens=0)
            made = trim(checkpoint, [source], rows=rows, expected=self._expected)
            tokenizer = load_tokenizer(str(made.path), trust_remote_code=made.trust_remote_code)
            self._kept[rows] = made.vocabulary.kept, tokenizer
        return self._kept[rows]

    @property
    def _tokenizer(self) -> Any:
        return self.texts.tokenizer().backend_tokenizer

    @cached_property
    def _counts(self) -> Counter[int]:
        """How often tokens occur in the text, in all of its files, but where it scores or judges."""
        text = self.texts.sequences
        files = {label: source.text for label, source in self._named.items() if source.text}
        counts = _counted(text.tokens[[kind not in files for kind in text.kinds]])
        for file in files.values():
            counts += count_tokens(self._tokenizer, _first(documents(text=file), MOST_CHARACTERS))
        aside = torch.cat([text.tokens[held_out(text.kinds, HELD_OUT)], self.ground.scores])
        return counts - _counted(aside)

    @cached_property
    def _named(self) -> dict[str, TextSource]:
        """The sources that somebody named, by the kind of text that each is; all other kinds the model wrote."""
        calibration = self.texts.calibration
        named = zip(calibration.labels, calibration.sources, strict=True)
        return {label: source for label, source in named if not source.kinds}

    @cached_property
    def _expected(self) -> Expected:
        """How often the parent expects each token where options are fitted."""
        read, written = torch.zeros(2, self.texts.parent.spec.vocab)
        with torch.no_grad():
            for row, kind in zip(self.ground.fitting[-1], self.ground.fits.kinds, strict=True):
                here = self.ground.runner.expected(row)[: len(read)]
                read += here
                if kind not in self._named:
                    written += here
        said = dict(enumerate(written.tolist())) if written.any() else {}
        return Expected(dict(enumerate(read.tolist())), said)

    @cached_property
    def _theirs(self) -> tuple[Pieces, Tensor]:
        """The scoring text in the parent's tokens, and the parent's nats of each, [S, T - 1]."""
        tokenizer = self.texts.tokenizer()
        pieces = Pieces.of(texts_of(self.ground.scores, tokenizer), tokenizer, self.ground.scores.shape[1])
        _, left = self.ground.read(pieces.tokens)
        return pieces, self._nats(pieces, left, None)

    def _read(self, rows: int) -> Reading:
        kept, tokenizer = self._trimmed(rows)
        texts = texts_of(self.ground.scores, self.texts.tokenizer())
        mine = Pieces.of(texts, tokenizer, self.ground.scores.shape[1], kept)
        entered, left = self.ground.read(mine.tokens)
        columns = torch.tensor(kept)
        my_nats, (theirs, their_nats) = self._nats(mine, left, columns), self._theirs
        more, counts = [], []
        for row in range(len(texts)):
            here, there = _spans(mine.places(row), theirs.places(row))
            # A token is predicted by what leaves the place before it.
            more.append(float(my_nats[row, slice(*here)].sum() - their_nats[row, slice(*there)].sum()))
            counts.append((here[1] - here[0], there[1] - there[0]))
        my_tokens, their_tokens = (max(1, sum(each)) for each in zip(*counts, strict=True))
        lost = torch.tensor(more) * (len(texts) / their_tokens)
        return Reading(entered[None], left, columns, mine.lengths, my_tokens / their_tokens, lost)

    def _nats(self, pieces: Pieces, left: Tensor, kept: Tensor | None) -> Tensor:
        """-log p of each token but the first, among those that stay, [S, T - 1]."""
        runner, found = self.ground.runner, []
        with torch.no_grad():
            for row in track(range(len(left)), "score a vocabulary", unit="sequences"):
                logits = runner.final(left[row, :-1].to(runner.device)).float()
                target = logits.gather(1, pieces.tokens[row, 1:, None].to(logits.device))[:, 0]
                among = logits if kept is None else logits.index_select(-1, kept.to(logits.device))
                found.append((among.logsumexp(-1) - target).cpu())
        return torch.stack(found)


def _spans(mine: dict[int, int], theirs: dict[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """What both have between the first and the last character at which both begin a token, as slices of nats."""
    common = mine.keys() & theirs.keys()
    if len(common) < 2:
        return (0, 0), (0, 0)
    first, last = min(common), max(common)
    here, there = ((places[first] - 1, places[last] - 1) for places in (mine, theirs))
    return here, there


def _counted(tokens: Tensor) -> Counter[int]:
    return Counter(tokens.flatten().tolist())


def _first(found: Iterable[Iterable[str]], characters: int) -> Iterator[Iterator[str]]:
    """The documents up to so many characters."""
    left = characters

    def pieces(document: Iterable[str]) -> Iterator[str]:
        nonlocal left
        for piece in document:
            yield piece
            left -= len(piece)
            if left <= 0:
                return

    for document in found:
        yield pieces(document)
        if left <= 0:
            return
