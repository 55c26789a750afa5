"""A checkpoint with fewer rows of its vocabulary: chosen when it is opened, for all that follows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llmsurgeon.operations.trim_vocab import TrimVocab
from llmsurgeon.planning.opened import OpenedCheckpoint, opened_model
from llmsurgeon.text.documents import documents
from llmsurgeon.vocabulary.trimmed import Source, TrimmedCheckpoint, trim


def trimmed_by(parent: OpenedCheckpoint, step: TrimVocab) -> OpenedCheckpoint:
    """The checkpoint with the rows that `step` keeps.

    Raises:
        SurgeryError: the vocabulary cannot be trimmed as asked for.
    """
    sources = [
        Source(
            documents(text=entry.text) if entry.text else None,
            entry.min_count,
            entry.tokens,
            Path(entry.file) if entry.file else None,
        )
        for entry in step.entries
    ]
    return trimmed(parent, trim(parent.checkpoint, sources, rows=step.rows, multiple_of=step.multiple_of))


def trimmed(whole: OpenedCheckpoint, checkpoint: TrimmedCheckpoint) -> OpenedCheckpoint:
    """`whole` with the rows of `checkpoint` alone."""
    vocabulary = checkpoint.vocabulary
    notes = [f"Vocabulary: {len(vocabulary.kept):,} of {vocabulary.size:,} rows stay."]
    if checkpoint.left_out:
        notes.append(f"Left out, since they hold the parent's vocabulary: {', '.join(checkpoint.left_out)}.")
    made = opened_model(checkpoint)
    return replace(made, whole=whole, notes=(*made.notes, *notes))
