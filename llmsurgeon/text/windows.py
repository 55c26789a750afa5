"""Windows of tokens cut from a text, spread over all of it. S windows of L tokens."""

from __future__ import annotations

import random
import re
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmsurgeon.boundary.foreign import token_ids
from llmsurgeon.errors import SurgeryError
from llmsurgeon.text.wanted import Calibration

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Texts beyond this many characters a token of the budget are read in passages spread over them, not in full.
FULL_READ = 32
# Characters of a passage for each token wanted of it; doubled where they turn out too few.
PASSAGE = 8
# Where a sentence ends, and the characters below which a piece is rather a heading or an abbreviation.
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
SHORTEST_SENTENCE = 40


def cut(text: str, name: str, tokenizer: PreTrainedTokenizerBase, wanted: Calibration) -> Tensor:
    """As many windows as are wanted (fewer where the text is short) spread evenly over the text: int64 [S, L]."""
    if not text.strip():
        raise SurgeryError(f"{name}: the text is empty")
    length, seed = wanted.sequence_length, wanted.seed
    count = wanted.tokens // length
    start, end = window_start(tokenizer), window_end(tokenizer)
    inner = length - len(start) - len(end)
    if inner < 1:
        raise SurgeryError(f"windows of {length} tokens hold special tokens only; raise --seq-len")
    if wanted.sentences:
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
