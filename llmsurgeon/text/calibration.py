"""Calibration tokens: from a text file, a hub dataset, or the model itself. S sequences of L tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from llmsurgeon.errors import SurgeryError
from llmsurgeon.text.cache import cached_self_text, model_fingerprint
from llmsurgeon.text.documents import stream_text
from llmsurgeon.text.files import file_text
from llmsurgeon.text.self_text import Sampling, SelfText, sample_self_text
from llmsurgeon.text.sequences import Sequences
from llmsurgeon.text.wanted import Calibration
from llmsurgeon.text.windows import PASSAGE, cut

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SELF = "self"  # the kind of text that the model wrote


def calibration_sequences(
    model_name: str,
    tokenizer: PreTrainedTokenizerBase,
    wanted: Calibration,
    model: PreTrainedModel | Callable[[], PreTrainedModel] | None = None,
    fingerprint: str | None = None,
    sampling: Sampling | None = None,
) -> Sequences:
    """The tokens wanted as non-overlapping windows [S, L], each with its kind: same arguments, same windows.

    Args:
        model_name: for messages.
        wanted: of a text file or a hub dataset windows are spread over all of it, or each is one sentence, filled up
            with the tokenizer's padding; what is longer is cut.
        model: the model to sample from where neither is given, or a function that loads it, called only where the
            text is not in the cache yet; with a function, `fingerprint` (of the weights) must be given.
        sampling: how to sample, the default recipe otherwise.

    Raises:
        SurgeryError: no such file, of another kind, not UTF-8, empty, shorter than one window, dataset out of reach, no
            model.
    """
    if wanted.text:
        return _all_of(cut(file_text(wanted.text), wanted.text, tokenizer, wanted), wanted.text)
    if wanted.dataset:
        # Documents differ in length and cannot be counted in a stream, so enough text is taken for the whole budget.
        passages = stream_text(wanted.dataset, wanted.seed, characters=wanted.tokens * PASSAGE)
        return _all_of(cut(passages, wanted.dataset, tokenizer, wanted), wanted.dataset)
    return _all_of(_sample(wanted, model_name, tokenizer, model, fingerprint, sampling), SELF)


def _all_of(windows_SL: Tensor, kind: str) -> Sequences:
    return Sequences(windows_SL, (kind,) * len(windows_SL))


def _sample(
    wanted: Calibration,
    model_name: str,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel | Callable[[], PreTrainedModel] | None,
    fingerprint: str | None,
    sampling: Sampling | None,
) -> Tensor:
    """Self text, from the cache where it is there."""
    from transformers import PreTrainedModel

    if model is None:
        raise SurgeryError(f"{model_name}: no calibration text; give --text FILE or --dataset NAME")
    if isinstance(model, PreTrainedModel):
        loaded = model
        fingerprint = fingerprint or model_fingerprint(loaded)
        load: Callable[[], PreTrainedModel] = lambda: loaded  # noqa: E731
    else:
        load = model
    text = SelfText(wanted.tokens, wanted.sequence_length, wanted.seed, sampling=sampling or Sampling())
    if fingerprint is None:
        return sample_self_text(load(), tokenizer, text)
    return cached_self_text(load, tokenizer, fingerprint, text)
