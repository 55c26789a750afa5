"""Small tokenizers of each kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.odd_text import odd_lines
from tests.prose import sentences

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]


@cache
def corpus() -> list[str]:
    """Lines to train on: prose, code, and odd text for the rare characters."""
    return sentences(900, seed=7) + odd_lines(60, seed=7)


def byte_level(ignore_merges: bool = False) -> Tokenizer:
    """As GPT-2, SmolLM and Qwen; with `ignore_merges` as Llama 3."""
    made = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet))
    made.add_special_tokens(["<s>", "</s>", "<|image|>"])
    made.add_tokens(["<tool>"])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    return made


def sentence_piece() -> Tokenizer:
    """As Llama 2 and Gemma: BPE over characters, bytes where a character is no token."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    learner.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=900, limit_alphabet=120))
    learnt = json.loads(learner.to_str())["model"]
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(learnt["vocab"], key=learnt["vocab"].get)]
    # SentencePiece joins any two neighbours that make a piece: each piece has a merge for every way to halve it.
    pieces = [left + right for left, right in learnt["merges"]]
    merges = [
        (piece[:at], piece[at:])
        for piece in dict.fromkeys(pieces)
        for at in range(1, len(piece))
        if piece[:at] in learnt["vocab"] and piece[at:] in learnt["vocab"]
    ]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(SPECIAL)
    return made


def word_piece() -> Tokenizer:
    """As BERT."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(corpus(), trainers.WordPieceTrainer(vocab_size=1200, special_tokens=special))
    made.post_processor = processors.BertProcessing(
        ("[SEP]", made.token_to_id("[SEP]")), ("[CLS]", made.token_to_id("[CLS]"))
    )
    return made


def unigram() -> Tokenizer:
    """As T5 and XLM-R."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.train_from_iterator(
        corpus(), trainers.UnigramTrainer(vocab_size=700, special_tokens=SPECIAL, unk_token="<unk>")
    )
    return made


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "byte-level, whole words": lambda: byte_level(ignore_merges=True),
    "sentence-piece": sentence_piece,
    "word-piece": word_piece,
    "unigram": unigram,
}


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    """The tokenizer of a kind, trained once."""
    return KINDS[kind]()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def description_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """Its tokenizer.json."""
    return json.loads(tokenizer.to_str())
