"""A checkpoint with fewer rows of its vocabulary: chosen when it is opened, for all that follows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from llmsurgeon.errors import SurgeryError
from llmsurgeon.operations.trim_vocab import KeepTokens, TrimVocab
from llmsurgeon.planning.opened import OpenedCheckpoint, opened_model
from llmsurgeon.planning.options import Options
from llmsurgeon.planning.sources import too_large
from llmsurgeon.planning.texts import Texts
from llmsurgeon.progress import Progress, remark
from llmsurgeon.recipe.recipe import Calibration, TextSource
from llmsurgeon.text.documents import documents
from llmsurgeon.vocabulary.likely import Expected
from llmsurgeon.vocabulary.trimmed import Source, TrimmedCheckpoint, trim
from llmsurgeon.walk.variants import Variant
from llmsurgeon.walk.walk import walk

# Of each text, in windows of so many, the model is asked what it expects; so much it writes.
EXPECTED_TOKENS, WINDOW = 8192, 256


def trimmed_by(parent: OpenedCheckpoint, step: TrimVocab, options: Options | None) -> OpenedCheckpoint:
    """The checkpoint with the rows that `step` keeps; without `options`, for a dry run, so many rows of no choice.

    Raises:
        SurgeryError: the vocabulary cannot be trimmed as asked for.
    """
    entries = _written(parent, step.entries)
    read = {} if options is None else {entry: _texts(parent, entry, options) for entry in entries if entry.read}
    expected = None
    if step.fill == "predicted":
        if parent.family.encoder:
            remark(f"{parent.name}: an encoder predicts no next token, so rows fill up in the vocabulary's order")
        else:
            expected = _expected(read)
    sources = [_source(entry, read.get(entry)) for entry in entries]
    return trimmed(
        parent, trim(parent.checkpoint, sources, rows=step.rows, multiple_of=step.multiple_of, expected=expected)
    )


def _expected(read: Mapping[KeepTokens, Texts]) -> Expected | None:
    """What the model expects in the texts of some entries; None where nothing was read."""
    # Two entries may take tokens of one text in two ways.
    texts = {(entry.text, entry.self): texts for entry, texts in read.items()}
    found = {source: expected_tokens(each) for source, each in texts.items()}
    written = [each for (_, of_itself), each in found.items() if of_itself]
    return Expected(_added(found.values()), _added(written)) if found else None


def _added(some: Iterable[Mapping[int, float]]) -> dict[int, float]:
    """The sums of what some mappings have under the same key."""
    sums: dict[int, float] = {}
    for each in some:
        for key, value in each.items():
            sums[key] = sums.get(key, 0.0) + value
    return sums


def _written(parent: OpenedCheckpoint, entries: tuple[KeepTokens, ...]) -> tuple[KeepTokens, ...]:
    """The entries without those of text that the model would have to write where it cannot.

    Raises:
        SurgeryError: none is left.
    """
    others = tuple(entry for entry in entries if not entry.self)
    if len(others) == len(entries):
        return entries
    reason = "an encoder writes no text" if parent.family.encoder else too_large(parent)
    if reason is None:
        return entries
    if not others:
        raise SurgeryError(f"trim_vocab: {parent.name}: {reason}; give keep a text (--vocab-text FILE)")
    remark(f"{parent.name}: {reason}, so tokens are not kept by it")
    return others


def _texts(parent: OpenedCheckpoint, entry: KeepTokens, options: Options) -> Texts:
    """The text of an entry in windows, as much of it as the model reads."""
    source = TextSource(text=entry.text, self=entry.self)
    length = min(WINDOW, parent.spec.max_positions or WINDOW)
    asked = Calibration(texts=(source,), tokens=EXPECTED_TOKENS, sequence_length=length)
    return Texts(parent, asked, EXPECTED_TOKENS, options)


def _source(entry: KeepTokens, texts: Texts | None) -> Source:
    """The tokens that an entry asks for; of what the model writes those of `texts`, none for a dry run."""
    if entry.self:
        written = texts.windows.flatten().tolist() if texts else ()
        return Source(counts=Counter(written), min_count=entry.min_count, tokens=entry.tokens)
    return Source(
        documents(text=entry.text) if entry.text else None,
        entry.min_count,
        entry.tokens,
        Path(entry.file) if entry.file else None,
    )


def trimmed(whole: OpenedCheckpoint, checkpoint: TrimmedCheckpoint) -> OpenedCheckpoint:
    """`whole` with the rows of `checkpoint` alone."""
    vocabulary = checkpoint.vocabulary
    notes = [f"Vocabulary: {len(vocabulary.kept):,} of {vocabulary.size:,} rows stay."]
    if checkpoint.left_out:
        notes.append(f"Left out, since they hold the parent's vocabulary: {', '.join(checkpoint.left_out)}.")
    made = opened_model(checkpoint)
    return replace(made, whole=whole, notes=(*made.notes, *notes))


def expected_tokens(texts: Texts) -> Mapping[int, float]:
    """Token -> how often the model expects it on some texts: its next-token probabilities, summed over positions.

    What occurs in a text is few of the tokens that its like would use; what the model gives weight to there is all of
    them. Layers are read one at a time.

    Raises:
        SurgeryError: the text is shorter than a window.
    """
    hidden = walk(texts.runner, texts.windows, [Variant()], batch=texts.options.batch)[0]
    counts = torch.zeros(texts.parent.spec.vocab)
    with torch.no_grad(), Progress("expected tokens", len(hidden), "sequences") as progress:
        for row in hidden:
            counts += texts.runner.expected(row)[: len(counts)]
            progress.advance()
    return dict(enumerate(counts.tolist()))
