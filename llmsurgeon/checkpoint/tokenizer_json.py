"""The `model` inside a tokenizer.json: its tokens and its merges, however the file spells them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Model = Mapping[str, Any]


def tokens_of(model: Model) -> dict[str, int]:
    """Token -> id, added tokens not counted."""
    vocab = model["vocab"]
    return {piece: i for i, (piece, _) in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)


def pairs_of(model: Model) -> list[tuple[str, str]]:
    """The merges of a BPE, which files write as "a b" or as ["a", "b"]."""
    split = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in split]
