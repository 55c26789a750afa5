"""tokenizer.json from the `tokenizer.*` fields of a GGUF file.

Written here and not by transformers, which ignores the name of the pre-tokenizer and cuts every byte-level BPE's text
as GPT-2 does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmsurgeon.boundary.limits import LONGEST_TOKEN
from llmsurgeon.checkpoint.gguf.pretokenizers import BY_NAME, to_tokenizer_json
from llmsurgeon.errors import CheckpointError

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # token types
SPACE = "▁"
# Names of special tokens in transformers, and the ids in the file.
NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def write_tokenizer(metadata: Mapping[str, Any], folder: Path, where: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template into `folder`.

    Raises:
        CheckpointError: a kind of tokenizer that is not known here, or fields that contradict one another.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise CheckpointError(f"{where}: has no tokenizer")
    longest = max(tokens, key=len)
    if len(longest) > LONGEST_TOKEN:
        raise CheckpointError(
            f"{where}: token {tokens.index(longest)} of its tokenizer has {len(longest):,} characters, expected at "
            f"most {LONGEST_TOKEN:,}; download it again"
        )
    description = _description(metadata, tokens, where)
    special = {}
    for name, key in NAMED.items():
        i = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if i is not None and i < len(tokens):
            special[name] = tokens[i]
    try:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(description)), clean_up_tokenization_spaces=False, **special
        )
    except Exception as error:  # tokenizers raises bare Exceptions on what a stranger's file leads it into
        raise CheckpointError(f"{where}: its tokenizer cannot be converted: {error}") from error
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    tokenizer.save_pretrained(folder)


def _description(metadata: Mapping[str, Any], tokens: list[str], where: Path) -> dict[str, Any]:
    kind = metadata.get("tokenizer.ggml.model")
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(types) != len(tokens):
        raise CheckpointError(f"{where}: its tokenizer has {len(tokens)} tokens and {len(types)} token types")
    if kind == "gpt2":
        parts, bos = _byte_level(metadata, tokens, where)
    elif kind == "llama":
        parts, bos = _sentence_piece(metadata, tokens, types, where), True
    else:
        raise CheckpointError(f"{where}: its tokenizer is of kind {kind!r}; gpt2 and llama can be converted")
    added = [
        {
            "id": i,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": types[i] != USER_DEFINED,
        }
        for i, text in enumerate(tokens)
        if types[i] in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    around = {
        "bos": metadata.get("tokenizer.ggml.add_bos_token", bos),
        "eos": metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    processor = _post_processor(metadata, tokens, around)
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added} | parts | processor


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], where: Path) -> tuple[dict[str, Any], bool]:
    """The parts of tokenizer.json, and whether the start token is added where no field says."""
    name = metadata.get("tokenizer.ggml.pre", "default")
    pre = BY_NAME.get(name)
    if pre is None:
        raise CheckpointError(
            f"{where}: its pre-tokenizer {name!r} is not known here, so its text would be cut wrongly; known are "
            f"{', '.join(sorted(BY_NAME))}. Use the model's safetensors instead"
        )
    vocab = {text: i for i, text in enumerate(tokens)}
    pairs = (merge.split(" ", 1) for merge in metadata.get("tokenizer.ggml.merges", ()))
    merges = [pair for pair in pairs if len(pair) == 2 and {*pair, "".join(pair)} <= vocab.keys()]
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": pre.whole_words}
    normalizer = {"type": "NFC"} if pre.composes else None
    parts = {"normalizer": normalizer, "pre_tokenizer": to_tokenizer_json(pre), "decoder": decoder, "model": model}
    return parts, pre.name in ("llama-bpe", "tekken")


def _sentence_piece(metadata: Mapping[str, Any], tokens: list[str], types: list[int], where: Path) -> dict[str, Any]:
    scores = metadata.get("tokenizer.ggml.scores", ())
    if len(scores) != len(tokens):
        raise CheckpointError(f"{where}: its tokenizer has {len(tokens)} tokens and {len(scores)} scores")
    vocab = {text: i for i, text in enumerate(tokens)}
    unknown = next((text for text, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace]}
    model = {
        "type": "BPE",
        "vocab": vocab,
        "merges": list(_merges(vocab, tokens, types, scores)),
        "unk_token": unknown,
        "fuse_unk": True,
        "byte_fallback": "<0x00>" in vocab,
    }
    return {
        "normalizer": prepend if prefix else replace,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": model,
    }


def _merges(vocab: Mapping[str, int], tokens: list[str], types: list[int], scores: list[float]) -> Iterator[list[str]]:
    """Every way to halve a piece, best piece first: what SentencePiece would join, in its order."""
    normal = [i for i, kind in enumerate(types) if kind == 1]
    pieces = {tokens[i] for i in normal}
    lengths = sorted({len(piece) for piece in pieces})
    known = set(lengths)
    for i in sorted(normal, key=lambda i: (-scores[i], i)):
        text = tokens[i]
        # Only where there are pieces as long as both halves: a long token has few such places.
        places = (at for at in lengths if at < len(text) and len(text) - at in known)
        halves = ((text[:at], text[at:]) for at in places)
        found = [(left, right) for left, right in halves if left in pieces and right in pieces]
        yield from ([left, right] for left, right in sorted(found, key=lambda pair: (vocab[pair[0]], vocab[pair[1]])))


def _post_processor(metadata: Mapping[str, Any], tokens: list[str], around: Mapping[str, bool]) -> dict[str, Any]:
    ids = {key: metadata.get(f"tokenizer.ggml.{key}_token_id") for key, added in around.items() if added}
    texts = {key: tokens[i] for key, i in ids.items() if i is not None and i < len(tokens)}

    def template(*names: str) -> list[dict[str, Any]]:
        made = []
        for place, name in enumerate(names):
            before = [{"SpecialToken": {"id": texts["bos"], "type_id": place}}] if "bos" in texts else []
            after = [{"SpecialToken": {"id": texts["eos"], "type_id": place}}] if "eos" in texts else []
            made += [*before, {"Sequence": {"id": name, "type_id": place}}, *after]
        return made

    special = {text: {"id": text, "ids": [ids[key]], "tokens": [text]} for key, text in texts.items()}
    made = {
        "type": "TemplateProcessing",
        "single": template("A"),
        "pair": template("A", "B"),
        "special_tokens": special,
    }
    return {"post_processor": made}
