"""A checkpoint with fewer rows of its vocabulary: chosen when it is opened, for all that follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from llmsurgeon.operations.trim_vocab import TrimVocab
from llmsurgeon.planning.opened import OpenedCheckpoint, opened_model
from llmsurgeon.planning.options import Options
from llmsurgeon.planning.texts import Texts
from llmsurgeon.progress import Progress, remark
from llmsurgeon.recipe.recipe import Calibration
from llmsurgeon.text.documents import documents
from llmsurgeon.vocabulary.trimmed import Source, TrimmedCheckpoint, trim
from llmsurgeon.walk.variants import Variant
from llmsurgeon.walk.walk import walk

# Of each text, in windows of so many, the model is asked what it expects.
EXPECTED_TOKENS, WINDOW = 8192, 256


def trimmed_by(parent: OpenedCheckpoint, step: TrimVocab, options: Options | None) -> OpenedCheckpoint:
    """The checkpoint with the rows that `step` keeps; without `options`, for a dry run, so many rows of no choice.

    Raises:
        SurgeryError: the vocabulary cannot be trimmed as asked for.
    """
    expected: dict[int, float] = {}
    asked = step.fill == "predicted"
    if asked and parent.family.encoder:
        remark(f"{parent.name}: an encoder predicts no next token, so rows fill up in the vocabulary's order")
    elif asked and options is not None:
        for text in dict.fromkeys(entry.text for entry in step.entries if entry.text):
            for token, count in expected_tokens(parent, text, options).items():
                expected[token] = expected.get(token, 0.0) + count
    sources = [
        Source(
            documents(text=entry.text) if entry.text else None,
            entry.min_count,
            entry.tokens,
            Path(entry.file) if entry.file else None,
        )
        for entry in step.entries
    ]
    return trimmed(
        parent, trim(parent.checkpoint, sources, rows=step.rows, multiple_of=step.multiple_of, expected=expected)
    )


def trimmed(whole: OpenedCheckpoint, checkpoint: TrimmedCheckpoint) -> OpenedCheckpoint:
    """`whole` with the rows of `checkpoint` alone."""
    vocabulary = checkpoint.vocabulary
    notes = [f"Vocabulary: {len(vocabulary.kept):,} of {vocabulary.size:,} rows stay."]
    if checkpoint.left_out:
        notes.append(f"Left out, since they hold the parent's vocabulary: {', '.join(checkpoint.left_out)}.")
    made = opened_model(checkpoint)
    return replace(made, whole=whole, notes=(*made.notes, *notes))


def expected_tokens(parent: OpenedCheckpoint, text: str, options: Options) -> Mapping[int, float]:
    """Token -> how often the model expects it on some of a text: its next-token probabilities, summed over positions.

    What occurs in a text is few of the tokens that its like would use; what the model gives weight to there is all of
    them. Layers are read one at a time.

    Raises:
        SurgeryError: the text is shorter than a window.
    """
    length = min(WINDOW, parent.spec.max_positions or WINDOW)
    texts = Texts(
        parent,
        Calibration(text=text, self_share=0, tokens=EXPECTED_TOKENS, sequence_length=length),
        EXPECTED_TOKENS,
        options,
    )
    windows = texts.windows
    hidden = walk(texts.runner, windows, [Variant()], batch=options.batch)[0]
    counts = torch.zeros(parent.spec.vocab)
    with torch.no_grad(), Progress("expected tokens", len(hidden), "sequences") as progress:
        for row in hidden:
            logits = texts.runner.final(row.to(options.device))
            counts += logits.float().softmax(-1).sum(0)[: len(counts)].cpu()
            progress.advance()
    return dict(enumerate(counts.tolist()))
