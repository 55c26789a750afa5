"""Calibration tokens: from a text file, a hub dataset, or the model itself. S sequences of L tokens."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmsurgeon.boundary.foreign import token_ids
from llmsurgeon.errors import SurgeryError
from llmsurgeon.text.files import file_documents, file_text, kind_of, texts_of
from llmsurgeon.text.self_text import Sampling, SelfText, cached_self_text, model_fingerprint, sample_self_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Texts beyond this many characters a token of the budget are read in passages spread over them, not in full.
FULL_READ = 32
# Characters of a passage for each token wanted of it; doubled where they turn out too few.
PASSAGE = 8
# Where a sentence ends, and the characters below which a piece is rather a heading or an abbreviation.
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
SHORTEST_SENTENCE = 40
# The revision of a dataset that cannot be told.
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Calibration:
    """How calibration tokens are made. At most one of `text` (a file) and `dataset` (NAME[:CONFIG][:SPLIT]);
    with neither, text is sampled from the model itself."""

    text: str | None = None
    dataset: str | None = None
    tokens: int = 65536
    sequence_length: int = 512
    seed: int = 0
    sentences: bool = False

    def __post_init__(self) -> None:
        if self.text and self.dataset:
            raise SurgeryError("calibration: give text or dataset, not both")
        if self.text:
            kind_of(self.text)
        if self.sequence_length < 2:
            raise SurgeryError(f"calibration: sequence_length is {self.sequence_length}, expected 2 or more")
        if self.tokens < self.sequence_length:
            raise SurgeryError(
                f"calibration: {self.tokens} tokens are less than one sequence of {self.sequence_length}; "
                "raise the number of tokens (--tokens), or lower the sequence length (--seq-len)"
            )

    def describe(self, windows_SL: Tensor, purpose: str = "calibration", sampled_from: str = "the model itself") -> str:
        """One line for the reader: how many tokens there are and where they come from."""
        line = f"{purpose}: {windows_SL.numel():,} tokens "
        if self.text:
            line += f"of {self.text}"
        elif self.dataset:
            line += f"of dataset {self.dataset}"
        else:
            line += f"sampled from {sampled_from} (no --text given)"
        if self.sentences:
            line += f", {len(windows_SL):,} sentences, padding counted"
        wanted = self.tokens // self.sequence_length
        return line if len(windows_SL) >= wanted else f"{line}; {self.tokens:,} were asked for"


def calibration_tokens(
    model_name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text: str | None = None,
    dataset: str | None = None,
    tokens: int = 65536,
    sequence_length: int = 512,
    seed: int = 0,
    sentences: bool = False,
    model: PreTrainedModel | Callable[[], PreTrainedModel] | None = None,
    fingerprint: str | None = None,
    sampling: Sampling | None = None,
) -> Tensor:
    """At most `tokens` tokens as non-overlapping windows, int64 [S, L]; the same arguments give the same windows.

    Args:
        model_name: for messages.
        text: a .txt, .jsonl (key "text") or .parquet (column "text") file; windows are spread over all of it.
        dataset: a hub dataset, NAME[:CONFIG][:SPLIT], streamed.
        sentences: a window of a text is one sentence, filled up with the tokenizer's padding; what is longer is cut.
        model: the model to sample from where neither is given, or a function that loads it, called only where the
            text is not in the cache yet; with a function, `fingerprint` (of the weights) must be given.
        sampling: how to sample, the default recipe otherwise.

    Raises:
        SurgeryError: no such file, of another kind, not UTF-8, empty, shorter than one window, dataset out of reach, no
            model.
    """
    wanted = Calibration(text, dataset, tokens, sequence_length, seed)
    count = tokens // sequence_length
    if text:
        return _cut(file_text(text), text, tokenizer, count, sequence_length, seed, sentences)
    if dataset:
        # Documents differ in length and cannot be counted in a stream, so enough text is taken for the whole budget.
        passages = _stream_text(dataset, seed, characters=tokens * PASSAGE)
        return _cut(passages, dataset, tokenizer, count, sequence_length, seed, sentences)
    return _sample(wanted, model_name, tokenizer, model, fingerprint, sampling)


def split(windows_SL: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """(train, held out): about `fraction` of the windows, evenly spread, are held out; at least one of each."""
    count = len(windows_SL)
    if count < 2:
        raise SurgeryError(
            f"{count} calibration sequence cannot be split into training and held-out ones; "
            "raise calibration tokens or lower sequence_length"
        )
    held = min(count - 1, max(1, round(count * fraction)))
    mask = torch.zeros(count, dtype=torch.bool)
    mask[[int((i + 0.5) * count / held) for i in range(held)]] = True
    return windows_SL[~mask], windows_SL[mask]


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


def documents(*, text: str | None = None, dataset: str | None = None, seed: int = 0) -> Iterator[Iterable[str]]:
    """The documents of a file (.txt holds one) or a hub dataset, each as pieces that follow one another.

    Nothing is read before it is asked for, so the text may be larger than memory.

    Raises:
        SurgeryError: as `calibration_tokens`.
    """
    if dataset:
        yield from ((document,) for document in _streamed(dataset, seed))
        return
    assert text is not None
    yield from file_documents(text)


def _stream_text(dataset: str, seed: int, characters: int) -> str:
    """`characters` characters or a little more from a shuffled stream of the dataset's documents."""
    texts: list[str] = []
    size = 0
    for text in _streamed(dataset, seed):
        texts.append(text)
        size += len(text)
        if size >= characters:
            break
    return "\n\n".join(texts)


def _streamed(dataset: str, seed: int) -> Iterator[str]:
    """The texts of a hub dataset, NAME[:CONFIG][:SPLIT], shuffled as they come."""
    name, _, rest = dataset.partition(":")
    config, _, part = rest.partition(":")
    revision = dataset_revision(dataset)
    # The very commit that caches and jobs go by, where it is one.
    pinned = {"revision": revision} if re.fullmatch("[0-9a-f]{40}", revision) else {}
    rows = _load_dataset(name, config or None, split=part or "train", name=dataset, **pinned)
    return _texts(rows.shuffle(seed=seed, buffer_size=1000), dataset)


@cache
def dataset_revision(dataset: str) -> str:
    """The commit of a hub dataset, NAME[:CONFIG][:SPLIT], that this process reads; of a local folder a hash of its
    files' names, sizes and times. "unknown" where the hub cannot be asked."""
    name = dataset.partition(":")[0]
    folder = Path(name)
    if folder.exists():
        files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else [folder]
        seen = [(str(path), (found := path.stat()).st_size, found.st_mtime_ns) for path in files]
        return sha256(json.dumps(seen).encode()).hexdigest()
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name, timeout=10).sha)
    except Exception:  # reading it will say what is wrong
        return UNKNOWN


def _load_dataset(*args: str | None, name: str, **kwargs: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise SurgeryError(f"{name}: reading it needs the datasets library: pip install datasets") from error
    try:
        return datasets.load_dataset(*args, **kwargs, streaming=True)
    except Exception as error:
        raise _unreachable(name, error) from error


def _texts(rows: Iterable[dict[str, Any]], name: str) -> Iterator[str]:
    """The text of each row that has any."""
    try:
        yield from texts_of(((lambda: f"dataset {name}", row) for row in rows), name)
    except SurgeryError:
        raise
    except Exception as error:  # a stream can fail in any of its layers: network, archive, parser
        raise _unreachable(name, error) from error


def _unreachable(name: str, error: Exception) -> SurgeryError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return SurgeryError(
        f"dataset {name} cannot be read: {reason}; check the name (NAME:CONFIG:SPLIT) and the network, "
        "unset HF_HUB_OFFLINE and HF_DATASETS_OFFLINE where they are set, or give a local file with --text"
    )


def _cut(
    text: str,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    length: int,
    seed: int,
    sentences: bool = False,
) -> Tensor:
    """`count` windows (fewer where the text is short) spread evenly over the text: int64 [S, L]."""
    if not text.strip():
        raise SurgeryError(f"{name}: the text is empty")
    start, end = window_start(tokenizer), window_end(tokenizer)
    inner = length - len(start) - len(end)
    if inner < 1:
        raise SurgeryError(f"windows of {length} tokens hold special tokens only; raise --seq-len")
    if sentences:
        return _sentences(text, tokenizer, count, length, seed)
    if len(text) > FULL_READ * count * inner:
        windows = _passages(text, tokenizer, count, inner, seed)
    else:
        ids = token_ids(tokenizer, text, add_special_tokens=False, verbose=False)
        if len(ids) < inner:
            raise SurgeryError(
                f"{name}: {len(ids)} tokens are fewer than one window of {inner}; give a longer text or shorter "
                "sequences (--seq-len, in a recipe calibration.sequence_length)"
            )
        whole = [ids[i : i + inner] for i in range(0, len(ids) - inner + 1, inner)]
        windows = [whole[i] for i in _spread(len(whole), min(count, len(whole)), seed)]
    if not windows:
        raise SurgeryError(f"{name}: no passage of it makes a window of {inner} tokens")
    return torch.tensor([start + window + end for window in windows], dtype=torch.long)


def _sentences(text: str, tokenizer: PreTrainedTokenizerBase, count: int, length: int, seed: int) -> Tensor:
    """`count` sentences (fewer where the text has fewer) spread evenly over the text, padded to `length`: [S, L].

    Headings and other lines that do not end as sentences do are left out; what follows a sentence's L tokens is cut.
    """
    if tokenizer.pad_token_id is None:
        raise SurgeryError("calibration.sentences: the tokenizer has no padding token; leave it out")
    pieces = sentences_of(text)
    chosen = [pieces[i] for i in _spread(len(pieces), min(count, len(pieces)), seed)]
    if not chosen:
        raise SurgeryError("calibration.sentences: the text has no sentence; leave it out, or give prose")
    return torch.tensor(padded(chosen, tokenizer, length), dtype=torch.long)


def sentences_of(text: str) -> list[str]:
    """The sentences of a text, without headings and other lines that do not end as sentences do."""
    found = (piece.strip() for piece in SENTENCE_END.split(text))
    return [piece for piece in found if len(piece) > SHORTEST_SENTENCE and piece[-1] in ".!?\"')"]


def padded(sentences: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> list[list[int]]:
    """Each sentence's tokens, cut or filled up with padding to `length`."""
    if not sentences:
        return []
    rows = token_ids(tokenizer, sentences, truncation=True, max_length=length, verbose=False)
    return [row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows]


def _passages(text: str, tokenizer: PreTrainedTokenizerBase, count: int, inner: int, seed: int) -> list[list[int]]:
    """One window from each of `count` equal shares of the text; each starts after a white space."""
    share = len(text) // count
    shift = random.Random(seed).randrange(max(1, share - PASSAGE * inner))
    windows = []
    for index in range(count):
        begin, end = index * share, (index + 1) * share
        start = min(begin + shift, end)
        start += next((i + 1 for i, c in enumerate(islice(text[start:end], 200)) if c.isspace()), 0)
        size = PASSAGE * inner
        while True:
            stop = min(start + size, end)
            ids = token_ids(tokenizer, text[start:stop], add_special_tokens=False, verbose=False)
            if len(ids) > inner or stop == end:
                break
            size *= 2
        if len(ids) >= inner:
            windows.append(ids[:inner])
    return windows


def _spread(available: int, count: int, seed: int) -> list[int]:
    """`count` indices of `available`, evenly spaced, shifted by the seed."""
    shift = random.Random(seed).random()
    return [int((i + shift) * available / count) for i in range(count)]


def window_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special token that the tokenizer puts before every text: Llama's bos, BERT's [CLS]; [] for Qwen and GPT-2."""
    first = token_ids(tokenizer, "a")[:1]
    return first if first and first[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id) else []


def window_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The separator that encoders' tokenizers put behind every text, else []."""
    last = token_ids(tokenizer, "a")[-1:]
    return last if last and last[0] == tokenizer.sep_token_id else []
