"""The calibration text of a run, and the parent that reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llmsurgeon import __version__
from llmsurgeon.boundary.foreign import check_token_ids
from llmsurgeon.errors import SurgeryError
from llmsurgeon.evaluation.bits_per_byte import BitsPerByte, Score, bits_per_byte, passages, texts_of
from llmsurgeon.evaluation.judge import walked
from llmsurgeon.formats.loading import load_tokenizer, model_of
from llmsurgeon.healing.distill.data import Rows, training_rows
from llmsurgeon.operations.distill import Distill
from llmsurgeon.planning.checks import check_text
from llmsurgeon.planning.opened import OpenedCheckpoint, check_length
from llmsurgeon.planning.options import Options, device_kind
from llmsurgeon.planning.sources import mixed, text_wanted, too_large
from llmsurgeon.processes.first import from_first
from llmsurgeon.recipe import recipe as recipe_file
from llmsurgeon.text.cache import cached_self_text
from llmsurgeon.text.calibration import calibration_sequences
from llmsurgeon.text.self_text import SelfText
from llmsurgeon.text.sequences import Sequences
from llmsurgeon.text.windows import window_start
from llmsurgeon.walk.runner import LayerRunner

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Texts:
    """Calibration text and the parent's runner, made when first asked for."""

    def __init__(
        self, parent: OpenedCheckpoint, wanted: recipe_file.Calibration, tokens: int, options: Options
    ) -> None:
        wanted = mixed(parent, wanted)
        self.parent, self.options, self.wanted = parent, options, wanted
        self.calibration = text_wanted(wanted, tokens, parent.family.encoder)
        self.description = "none"
        self._sequences: Sequences | None = None
        self._runner: LayerRunner | None = None

    @property
    def sequences(self) -> Sequences:
        """Calibration tokens [S, T], and the kind of each sequence."""
        if self._sequences is None:
            check_text(self.parent, self.wanted)
            setting = "calibration.sequence_length (--seq-len, or --set calibration.sequence_length=N)"
            if self.calibration.named:
                check_length(self.parent, self.calibration.sequence_length, setting)
            found = from_first(self._read)
            check_length(self.parent, found.tokens.shape[1], setting)
            self._check_ids(found.tokens)
            self._sequences = found
            self.description = self.calibration.describe(found)
            self.options.say(self.description)
        return self._sequences

    def _read(self) -> Sequences:
        """The text, read or sampled."""
        return calibration_sequences(self.parent.name, self.tokenizer(), self.calibration, self._model, self.parent_key)

    @property
    def windows(self) -> Tensor:
        """Calibration tokens [S, T]."""
        return self.sequences.tokens

    def training(self, step: Distill, windows: Sequences) -> list[Rows]:
        """What a distillation trains on; `windows` where nothing but the parent's own text is at hand."""
        check_length(self.parent, step.sequence_length, "distill.sequence_length")
        tokenizer = self.tokenizer()

        def sample(tokens: int, length: int, seed: int) -> Tensor:
            wanted = SelfText(tokens, length, seed)
            return from_first(lambda: cached_self_text(self._model, tokenizer, self.parent_key, wanted)).tokens

        rows = training_rows(step, self.calibration, windows, tokenizer, sample)
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
        return _tokenizer(self.parent)

    def _model(self) -> PreTrainedModel:
        """The parent in memory as a whole, to sample from.

        Raises:
            SurgeryError: it is larger than the memory that there is.
        """
        wants = too_large(self.parent, self.dtype)
        if wants and device_kind(self.options.device) == "cpu":
            raise SurgeryError(
                f"{self.parent.name}: {wants}; give --text FILE with --self-share 0, which reads layers one at a time"
            )
        return model_of(self.parent.checkpoint, dtype=self.dtype, device=self.options.device)

    @property
    def parent_key(self) -> str:
        """Names the parent as it computes here: what it samples and says is kept under it."""
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
        mine, theirs = self.tokenizer(), _tokenizer(whole)
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


def _tokenizer(model: OpenedCheckpoint) -> PreTrainedTokenizerBase:
    checkpoint = model.checkpoint
    return load_tokenizer(str(checkpoint.path), trust_remote_code=checkpoint.trust_remote_code)
