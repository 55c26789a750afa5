"""Calibration tokens: from a text file, a hub dataset, or the model itself. S sequences of L tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmsurgeon.errors import SurgeryError
from llmsurgeon.text.cache import cached_self_text, model_fingerprint
from llmsurgeon.text.documents import stream_text
from llmsurgeon.text.files import file_text
from llmsurgeon.text.self_text import Sampling, SelfText, sample_self_text
from llmsurgeon.text.sequences import Sequences
from llmsurgeon.text.wanted import Calibration, Source
from llmsurgeon.text.windows import PASSAGE, cut

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
        model: the model to sample from, or a function that loads it, called only where something is to be sampled and
            is not in the cache yet; with a function, `fingerprint` (of the weights) must be given.
        sampling: how to sample, the default recipe otherwise.

    Raises:
        SurgeryError: no such file, of another kind, not UTF-8, empty, shorter than one window, dataset out of reach, no
            model.
    """
    sampler = Sampler(model_name, tokenizer, model, fingerprint, sampling or Sampling())
    order = wanted.order()
    found: dict[int, Sequences] = {}
    for place, source in enumerate(wanted.sources):
        count = order.count(place)
        if not count:
            continue
        part = replace(wanted, tokens=count * wanted.sequence_length)
        if source.kinds:
            found[place] = _sample(source, part, sampler)
        else:
            windows = _read(source, part, tokenizer)
            found[place] = Sequences(windows, (wanted.labels[place],) * len(windows))
    return interleaved(found, order)


def interleaved(parts: Mapping[int, Sequences], order: Sequence[int]) -> Sequences:
    """The sequences of several sources in the order of their numbers; where a source has run out, those behind."""
    taken, rows = dict.fromkeys(parts, 0), list[tuple[int, int]]()
    for source in order:
        if taken[source] < len(parts[source]):
            rows.append((source, taken[source]))
            taken[source] += 1
    kinds = tuple(parts[source].kinds[row] for source, row in rows)
    return Sequences(torch.stack([parts[source].tokens[row] for source, row in rows]), kinds)


def _read(source: Source, wanted: Calibration, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Windows of a file or a dataset."""
    if source.text:
        return cut(file_text(source.text), source.text, tokenizer, wanted)
    assert source.dataset is not None
    # Documents differ in length and cannot be counted in a stream, so enough text is taken for the whole budget.
    passages = stream_text(source.dataset, wanted.seed, characters=wanted.tokens * PASSAGE)
    return cut(passages, source.dataset, tokenizer, wanted)


@dataclass(frozen=True)
class Sampler:
    """What samples text: arguments of `calibration_sequences`."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel | Callable[[], PreTrainedModel] | None
    fingerprint: str | None
    sampling: Sampling


def _sample(source: Source, wanted: Calibration, sampler: Sampler) -> Sequences:
    """Self text, from the cache where it is there."""
    from transformers import PreTrainedModel

    model, fingerprint = sampler.model, sampler.fingerprint
    if model is None:
        raise SurgeryError(f"{sampler.name}: no calibration text; give --text FILE or --dataset NAME")
    if isinstance(model, PreTrainedModel):
        loaded = model
        fingerprint = fingerprint or model_fingerprint(loaded)
        load: Callable[[], PreTrainedModel] = lambda: loaded  # noqa: E731
    else:
        load = model
    text = SelfText(wanted.tokens, wanted.sequence_length, wanted.seed, sampling=sampler.sampling, kinds=source.kinds)
    if fingerprint is None:
        return sample_self_text(load(), sampler.tokenizer, text)
    return cached_self_text(load, sampler.tokenizer, fingerprint, text)
