"""A model and the parent that it is compared with: both loaded, read through the right tokenizer, and judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmsurgeon.checkpoint.opening import open_checkpoint
from llmsurgeon.errors import CheckpointError, SurgeryError
from llmsurgeon.evaluation.across import evaluate_across
from llmsurgeon.evaluation.bits_per_byte import passages, texts_of
from llmsurgeon.evaluation.decoders import Evaluation, check_same_tokens, evaluate_decoder
from llmsurgeon.evaluation.encoders import (
    EncoderEvaluation,
    encoder_family,
    evaluate_encoder,
    masking_of,
    positions_of,
)
from llmsurgeon.evaluation.kinds import by_kind
from llmsurgeon.formats.loading import load_tokenizer, model_of
from llmsurgeon.formats.models import embedding_rows
from llmsurgeon.model.families import Family
from llmsurgeon.progress import Say, silent
from llmsurgeon.text.calibration import calibration_sequences
from llmsurgeon.text.sequences import Sequences
from llmsurgeon.text.wanted import Calibration
from llmsurgeon.text.windows import window_start
from llmsurgeon.vocabulary.keep import same_tokens
from llmsurgeon.vocabulary.trimmed import trimmed_like

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmsurgeon.checkpoint.source import Checkpoint


@dataclass
class Pair:
    """A model and its parent, if one is named, each loaded when it is first asked for.

    revision: of the model, on the hub. trust_remote_code: for tokenizers.
    """

    model: str
    against: str | None
    dtype: torch.dtype | None = None
    device: str = "cpu"
    revision: str | None = None
    trust_remote_code: bool = False

    @cached_property
    def opened(self) -> tuple[Checkpoint, ...]:
        """The model's checkpoint, and the parent's where there is one."""
        mine = open_checkpoint(self.model, revision=self.revision)
        return (mine,) if self.against is None else (mine, open_checkpoint(self.against))

    @cached_property
    def student(self) -> PreTrainedModel:
        """The model itself."""
        return model_of(self.opened[0], dtype=self.dtype, device=self.device)

    @cached_property
    def encoder(self) -> Family | None:
        """The family of an encoder, None of a decoder."""
        return encoder_family(self.student)

    @property
    def parent(self) -> PreTrainedModel | None:
        """The parent; of an encoder whose vocabulary was trimmed with the student's tokens alone."""
        return self._parent_and_tokenizer[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """What reads text for both: the parent's tokenizer, where there is one and it has the student's tokens."""
        return self._parent_and_tokenizer[1]

    @cached_property
    def own_tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's tokenizer."""
        return load_tokenizer(self.model, self.revision, trust_remote_code=self.trust_remote_code)

    @cached_property
    def _parent_and_tokenizer(self) -> tuple[PreTrainedModel | None, PreTrainedTokenizerBase]:
        if self.against is None:
            return None, self.own_tokenizer
        parent = model_of(self.opened[1], dtype=self.dtype, device=self.device)
        if (encoder_family(parent) is None) != (self.encoder is None):
            encoder, decoder = (self.model, self.against) if self.encoder else (self.against, self.model)
            raise SurgeryError(
                f"{encoder} is an encoder and {decoder} predicts the next token; compare models of one kind"
            )
        tokenizer = load_tokenizer(self.against, trust_remote_code=self.trust_remote_code)
        if not self._differ(parent):
            self._check_tokens(tokenizer)
        elif self.encoder:
            alike = trimmed_like(*self.opened)
            return model_of(alike, dtype=self.dtype, device=self.device), self.own_tokenizer
        return parent, tokenizer

    def _differ(self, parent: PreTrainedModel) -> bool:
        """Whether the two have vocabularies of different sizes."""
        return bool(parent.config.vocab_size != self.student.config.vocab_size)

    def _check_tokens(self, theirs: PreTrainedTokenizerBase) -> None:
        try:
            mine = self.own_tokenizer.get_vocab()
        except CheckpointError:  # the model came without a tokenizer; the parent's reads the text anyway
            return
        check_same_tokens(mine, theirs.get_vocab(), self.model, str(self.against))

    @property
    def positions(self) -> list[int]:
        """How long a sequence each of them takes, where it sets a limit."""
        models = [self.student, *([self.parent] if self.parent is not None else [])]
        return [limit for each in models if (limit := positions_of(each))]

    def sequences(self, source: Calibration) -> Sequences:
        """Tokens [S, L] to judge on, each with its kind; what is sampled comes from the parent, or from the model."""
        sampled = self.student if self.parent is None else self.parent
        return calibration_sequences(self.against or self.model, self.tokenizer, source, sampled)

    def judge(self, text: Sequences, say: Say) -> Evaluation | EncoderEvaluation:
        """Figures of the model on `text`, beside the parent's; `say` is told what cannot be measured.

        Raises:
            SurgeryError: the two cannot be compared, or values that are not finite.
        """
        windows, kinds = text.tokens, text.kinds
        if self.encoder:
            masking = masking_of(self.tokenizer, windows, self.student, self.parent, vocab=embedding_rows(self.student))
            return evaluate_encoder(self.student, windows, self.parent, masking, kinds)
        if self.parent is not None and self._differ(self.parent):
            whole = self._across(self.parent, windows, say)
            # Passages of different text need not be as many as windows, so each kind is judged by itself.
            each = by_kind(kinds, lambda mask: self._across(self.parent, windows[mask], silent))
            return replace(whole, kinds=each)
        return evaluate_decoder(self.student, windows, self.parent, kinds=kinds)

    def _across(self, parent: PreTrainedModel, windows: Tensor, say: Say) -> Evaluation:
        """Different tokenizers, on what the parent's `windows` say: bits per byte, and figures of tokens where the
        model's tokens are some of the parent's."""
        mine, theirs = self.own_tokenizer, self.tokenizer
        limits = [getattr(each.config, "max_position_embeddings", None) for each in (self.student, parent)]
        limit = min((each for each in limits if each), default=None)
        found = passages(texts_of(windows, theirs), mine, theirs, window_start(mine), window_start(theirs), limit)
        kept = None
        try:
            rows = same_tokens(mine.get_vocab(), theirs.get_vocab(), self.student.config.vocab_size, "other tokens")
            kept = torch.tensor(rows)
        except SurgeryError as error:
            say(f"only bits per byte are measured: {error}")
        return evaluate_across(self.student, parent, found, kept)


def check_encoder(family: Family, model: str, against: str | None, text: bool, tasks: Sequence[str]) -> None:
    """Raise SurgeryError for what an encoder cannot be asked.

    text: True where a file or a dataset is given, `tasks`: of the evaluation harness.
    """
    if not text:
        raise SurgeryError(
            f"{model}: {family.model_type} is an encoder and cannot sample text from itself; "
            "give --text FILE or --dataset NAME"
        )
    if tasks:
        raise SurgeryError(f"{model}: --tasks needs a model that predicts the next token, {family.model_type} does not")
    if not against and not family.head:
        raise SurgeryError(
            f"{model}: {family.model_class} has no masked-LM head, so only its agreement with a parent can be "
            "measured; give --against PARENT"
        )
