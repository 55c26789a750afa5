"""Where and how to run, and the calibration text of a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llmsurgeon import __version__
from llmsurgeon.boundary.foreign import check_token_ids
from llmsurgeon.checkpoint.staging import existing
from llmsurgeon.evaluation.bits_per_byte import BitsPerByte, Score, bits_per_byte, passages, texts_of
from llmsurgeon.evaluation.gate import walked
from llmsurgeon.formats.loading import load_tokenizer, model_of
from llmsurgeon.healing.distill.data import Rows, training_rows
from llmsurgeon.operations.distill import Distill as DistillStep
from llmsurgeon.operations.trim_vocab import TrimVocab
from llmsurgeon.planning.opened import OpenedCheckpoint, check_length, open_model, opened_model
from llmsurgeon.planning.plan import Planned, check_recipe, check_text
from llmsurgeon.recipe import recipe as recipe_file
from llmsurgeon.text.calibration import Calibration, calibration_tokens, documents, window_start
from llmsurgeon.text.self_text import SelfText, cached_self_text
from llmsurgeon.vocabulary.trimmed import Source, TrimmedCheckpoint, trim
from llmsurgeon.walk.runner import LayerRunner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """Where and how to run; nothing here changes what is computed but dtype and device.

    overwrite: replace an OUT that this tool wrote.
    discard_partial: delete what an unfinished run left in OUT.partial.
    reads: files that were read already, as the recipe, and must survive.
    planned: is told the plan before anything is healed or written.
    trust_remote_code: let code that a checkpoint's tokenizer brings along run, and go along.
    """

    device: str = "cpu"
    dtype: torch.dtype | None = None
    overwrite: bool = False
    max_shard_size: str = "5GB"
    batch: int = 8
    trust_remote_code: bool = False
    say: Say = field(default=lambda line: None)
    planned: Callable[[Planned], None] = field(default=lambda planned: None)
    discard_partial: bool = False
    reads: tuple[Path, ...] = ()

    def staging(self, *sources: Path) -> dict[str, Any]:
        """What Stage is to be told of OUT, where `sources` are read beside `reads`."""
        reads = (*sources, *self.reads)
        return {"overwrite": self.overwrite, "discard_partial": self.discard_partial, "sources": reads}


def files_of(recipe: recipe_file.Recipe) -> tuple[Path, ...]:
    """The files and folders that a recipe names and a run of it reads."""
    calibration = recipe.calibration
    sources = [source for step in recipe.steps if isinstance(step, DistillStep) for source in step.sources]
    trim = trims(recipe)
    return existing(
        *(calibration.text, calibration.dataset),
        *(name for entry in (trim.entries if trim else ()) for name in (entry.text, entry.file)),
        *(name for source in sources for name in (source.text, source.dataset)),
    )


def opened(
    model: str, recipe: recipe_file.Recipe, revision: str | None = None, trust_remote_code: bool = False
) -> OpenedCheckpoint:
    """The checkpoint that a recipe operates on: where its first step trims the vocabulary, with the rows that stay.

    Raises:
        SurgeryError: as `open_patient`, or the vocabulary cannot be trimmed as asked for.
    """
    parent = open_model(model, revision, trust_remote_code)
    step = trims(recipe)
    if step is None:
        return parent
    check_recipe(parent, recipe)
    assert parent.checkpoint is not None
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


def trims(recipe: recipe_file.Recipe) -> TrimVocab | None:
    """The step that trims the vocabulary, None where there is none."""
    return next((step for step in recipe.steps if isinstance(step, TrimVocab)), None)


def trimmed(whole: OpenedCheckpoint, checkpoint: TrimmedCheckpoint) -> OpenedCheckpoint:
    """`whole` with the rows of `checkpoint` alone."""
    vocabulary = checkpoint.vocabulary
    notes = [f"Vocabulary: {len(vocabulary.kept):,} of {vocabulary.size:,} rows stay."]
    if checkpoint.left_out:
        notes.append(f"Left out, since they hold the parent's vocabulary: {', '.join(checkpoint.left_out)}.")
    made = opened_model(checkpoint)
    return replace(made, whole=whole, notes=(*made.notes, *notes))


def device_kind(device: str) -> str:
    """cpu, cuda ...: what is computed is the same to the last bit on one of a kind only."""
    return torch.device(device).type


class Texts:
    """Calibration text and the parent's runner, made when first asked for."""

    def __init__(
        self, parent: OpenedCheckpoint, wanted: recipe_file.Calibration, tokens: int, options: Options
    ) -> None:
        self.parent, self.options, self.wanted = parent, options, wanted
        self.calibration = Calibration(
            wanted.text, wanted.dataset, tokens, wanted.sequence_length, wanted.seed, wanted.sentences
        )
        self.description = "none"
        self._windows: Tensor | None = None
        self._runner: LayerRunner | None = None

    @property
    def windows(self) -> Tensor:
        """Calibration tokens [S, T]."""
        if self._windows is None:
            check_text(self.parent, self.wanted)
            checkpoint = self.parent.checkpoint
            assert checkpoint is not None
            self._windows = calibration_tokens(
                self.parent.name,
                self.tokenizer(),
                text=self.calibration.text,
                dataset=self.calibration.dataset,
                tokens=self.calibration.tokens,
                sequence_length=self.calibration.sequence_length,
                seed=self.calibration.seed,
                sentences=self.calibration.sentences,
                model=lambda: model_of(checkpoint, dtype=self.dtype, device=self.options.device),
                fingerprint=self.parent_key,
            )
            setting = "calibration.sequence_length (--seq-len, or --set calibration.sequence_length=N)"
            check_length(self.parent, self._windows.shape[1], setting)
            self._check_ids(self._windows)
            self.description = self.calibration.describe(self._windows)
            self.options.say(self.description)
        return self._windows

    def training(self, step: DistillStep, windows: Tensor) -> list[Rows]:
        """What a distillation trains on; `windows` where nothing but the parent's own text is at hand."""
        check_length(self.parent, step.sequence_length, "distill.sequence_length")
        checkpoint = self.parent.checkpoint
        assert checkpoint is not None
        tokenizer = self.tokenizer()

        def sample(tokens: int, length: int, seed: int) -> Tensor:
            load = lambda: model_of(checkpoint, dtype=self.dtype, device=self.options.device)  # noqa: E731
            return cached_self_text(load, tokenizer, self.parent_key, SelfText(tokens, length, seed))

        rows = training_rows(
            step.sources, step.sequence_length, step.seed, self.calibration, windows, tokenizer, sample
        )
        for source in rows:
            self._check_ids(source.tokens)
            self.options.say(f"training text: {source.tokens.size:,} tokens of {source.name}")
        return rows

    def _check_ids(self, tokens: Tensor | np.ndarray) -> None:
        """Raise SurgeryError for tokens that the model has no embedding of."""
        if len(tokens):
            check_token_ids(int(tokens.min()), int(tokens.max()), self.parent.spec.vocab, self.parent.name)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The parent's tokenizer."""
        checkpoint = self.parent.checkpoint
        assert checkpoint is not None
        return load_tokenizer(str(checkpoint.path), trust_remote_code=checkpoint.trust_remote_code)

    @property
    def parent_key(self) -> str:
        """Names the parent as it computes here: what it samples and says is kept under it."""
        assert self.parent.checkpoint is not None
        libraries = [__version__, *(version(library) for library in ("torch", "transformers"))]
        how = [str(self.dtype), device_kind(self.options.device), *libraries]
        return sha256(json.dumps([self.parent.checkpoint.fingerprint, *how]).encode()).hexdigest()

    @property
    def dtype(self) -> torch.dtype:
        """What activations are computed in."""
        return self.parent.computed_in(self.options.dtype, self.options.device)

    def bits(self, student: Score, windows: Tensor) -> BitsPerByte | None:
        """Both models on what `windows` say, each with its own tokenizer; None where the tokenizer stayed as it was."""
        whole = self.parent.whole
        if whole is None or self.parent.family.encoder:
            return None
        assert whole.checkpoint is not None
        mine, theirs = (
            self.tokenizer(),
            load_tokenizer(str(whole.checkpoint.path), trust_remote_code=whole.checkpoint.trust_remote_code),
        )
        starts = window_start(mine), window_start(theirs)
        found = passages(texts_of(windows, mine), mine, theirs, *starts, self.parent.spec.max_positions)
        parent = LayerRunner(whole.config, whole.weights, self.dtype, self.options.device)
        return bits_per_byte(found, student, walked(parent, self.options.batch))

    @property
    def runner(self) -> LayerRunner:
        """The parent, layer by layer."""
        if self._runner is None:
            self._runner = self.walker(self.parent.config, self.parent.weights)
        return self._runner

    def walker(self, config: dict[str, Any], weights: Mapping[str, Tensor]) -> LayerRunner:
        """A model of this description on the calibration text, layer by layer."""
        padding = self.tokenizer().pad_token_id if self.calibration.sentences else None
        return LayerRunner(config, weights, self.dtype, self.options.device, padding)
