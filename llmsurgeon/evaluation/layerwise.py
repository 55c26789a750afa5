"""A model, and the parent that it is compared with, that memory does not hold: judged layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from llmsurgeon.boundary.foreign import check_token_ids
from llmsurgeon.checkpoint.source import Checkpoint
from llmsurgeon.errors import SurgeryError
from llmsurgeon.evaluation.decoders import Evaluation
from llmsurgeon.evaluation.encoders import EncoderEvaluation
from llmsurgeon.evaluation.judge import judge
from llmsurgeon.evaluation.pair import Pair
from llmsurgeon.formats.dtypes import computed_in, plain_dtype, stored_dtype
from llmsurgeon.formats.forms import form_of
from llmsurgeon.formats.loading import load_tokenizer
from llmsurgeon.formats.reading import Reading, read_model
from llmsurgeon.model.families import Family
from llmsurgeon.progress import Say, remark
from llmsurgeon.text.calibration import calibration_sequences
from llmsurgeon.text.sequences import Sequences
from llmsurgeon.text.wanted import Calibration
from llmsurgeon.walk.memory import room
from llmsurgeon.walk.runner import LayerRunner

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = 8  # sequences that go through a layer together


def pair_of(plain: Pair) -> Pair:
    """The pair as it is, where memory holds both its models; else one whose layers are read one at a time.

    Raises:
        SurgeryError: a model that cannot be read.
    """
    free = room() if torch.device(plain.device).type == "cpu" else None
    size = sum(_held(checkpoint, plain) for checkpoint in plain.opened)
    if free is None or size <= free.bytes:
        return plain
    what = f"{plain.model} takes" if plain.against is None else f"{plain.model} and {plain.against} take"
    remark(
        f"{what} {size / 1e9:.1f} GB of memory, and {free.bytes / 1e9:.1f} GB are free ({free.limit}): layers are "
        "read one at a time"
    )
    layered = LayerPair(plain.model, plain.against)
    vars(layered).update(vars(plain))  # what is open stays open
    return layered


def _held(checkpoint: Checkpoint, plain: Pair) -> int:
    """Bytes of a model in memory as a whole; of packed numbers, which are refused further on, those of the files."""
    meta = checkpoint.meta()
    if not stored_dtype(meta).is_floating_point:
        return checkpoint.nbytes()
    return checkpoint.nbytes(computed_in(plain_dtype(meta, checkpoint.config), plain.dtype, plain.device))


@dataclass
class LayerPair(Pair):
    """A pair whose layers are read one at a time. Both read text by one tokenizer, and text that is given."""

    @cached_property
    def readings(self) -> tuple[Reading, ...]:
        """The model, and the parent where there is one, held against their configs."""
        for checkpoint in self.opened:
            if unread := form_of(checkpoint.config).unread:
                raise SurgeryError(f"{checkpoint.name}: {unread}")
        found = tuple(read_model(checkpoint) for checkpoint in self.opened)
        if len({(each.family.encoder, _vocabulary(each), each.family.encoder and _width(each)) for each in found}) > 1:
            raise SurgeryError(
                f"{self.model} and {self.against} are larger than memory together, and differ in kind or vocabulary: "
                "layer by layer only models of one tokenizer (encoders: and of one width) are compared; give the "
                "process more memory"
            )
        return found

    @property
    def encoder(self) -> Family | None:
        family = self.readings[0].family
        return family if family.encoder else None

    @property
    def student(self) -> PreTrainedModel:
        raise self._too_large("--tasks needs the model in memory as a whole")

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self.against is None:
            return self.own_tokenizer
        tokenizer = load_tokenizer(self.against, trust_remote_code=self.trust_remote_code)
        self._check_tokens(tokenizer)
        return tokenizer

    @property
    def positions(self) -> list[int]:
        specs = [reading.family.describe(reading.config) for reading in self.readings]
        return [spec.max_positions for spec in specs if spec.max_positions]

    def sequences(self, source: Calibration) -> Sequences:
        if len(source.named) < len(source.sources):
            raise self._too_large("sampling text needs it in memory as a whole; give --text FILE or --dataset NAME")
        return calibration_sequences(self.against or self.model, self.tokenizer, source)

    def judge(self, text: Sequences, say: Say) -> Evaluation | EncoderEvaluation:
        if self.encoder and self.against is None:
            raise self._too_large("such an encoder is judged beside its parent alone; give --against PARENT")
        check_token_ids(int(text.tokens.min()), int(text.tokens.max()), _vocabulary(self.readings[0]), self.model)
        runners = [
            LayerRunner(each.config, each.weights, computed_in(each.dtype, self.dtype, self.device), self.device)
            for each in self.readings
        ]
        return judge(runners[0], runners[1] if len(runners) > 1 else None, text, lambda: self.tokenizer, BATCH)

    def _too_large(self, why: str) -> SurgeryError:
        return SurgeryError(f"{self.against or self.model}: is larger than the memory that is free, and {why}")


def _vocabulary(reading: Reading) -> int:
    return reading.family.describe(reading.config).vocab


def _width(reading: Reading) -> int:
    return reading.family.describe(reading.config).hidden
