"""The tokenizer of a checkpoint as the `tokenizer.*` fields of a GGUF file.

Taken over field by field where the source is a GGUF file, else converted from tokenizer.json. llama.cpp has the rules
of each tokenizer compiled in under a name, so rules that have no name there are refused: a guess would load and then
read text in pieces that the model never saw.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmsurgeon.boundary.foreign import read_json
from llmsurgeon.checkpoint.gguf.file import ARRAY, BOOL, FLOAT32, INT32, STRING, UINT32, Field, GGUFFile
from llmsurgeon.checkpoint.gguf.parts import open_gguf
from llmsurgeon.checkpoint.gguf.pretokenizers import BY_NAME, recognise
from llmsurgeon.checkpoint.tokenizer_json import pairs_of
from llmsurgeon.errors import CheckpointError, SurgeryError
from llmsurgeon.formats.loading import load_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # GGUF token types
SPACE = "▁"
UNREACHED = -1e4  # score of pieces that no merge makes
# Texts that end a text in llama.cpp, whatever their type says.
END_OF_TEXT = {
    *("</s>", "<eos>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|endoftext|>", "<|end_of_text|>", "<|end|>"),
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<end_of_utterance>", "<|return|>", "<|call|>"),
}
PHI3 = ("phi-3", "phi3")
PHI3_KEEPS = {"<unk>", "<s>", "<|endoftext|>"}


@dataclass(frozen=True)
class TokenizerFields:
    """The `tokenizer.*` fields, notes on what llama.cpp does differently, and whether it is to strip as for Phi-3.

    `strips`: llama.cpp drops the spaces behind special tokens where the model's name has "phi-3" in it.
    """

    fields: list[Field]
    notes: list[str]
    strips: bool

    def model_name(self, name: str) -> str:
        """`name`, so that llama.cpp strips spaces if, and only if, the tokenizer does."""
        named = any(word in name.lower() for word in PHI3)
        if named and not self.strips:
            return re.sub("phi-?3", "Phi 3", name, flags=re.IGNORECASE)
        return f"{name} (Phi-3 tokenizer)" if self.strips and not named else name


def tokenizer_fields(
    source: Path, rows: int, pre: str | None = None, trust_remote_code: bool = False
) -> TokenizerFields:
    """The tokenizer of a model with `rows` embeddings.

    `source` is the checkpoint's folder or GGUF file; `pre` overrides the name of the pre-tokenizer; code that the
    tokenizer brings along runs only with `trust_remote_code`.

    Raises:
        SurgeryError: no tokenizer, one that llama.cpp has no counterpart of, or more tokens than embeddings.
    """
    if source.is_file():
        return _copied(open_gguf(source), rows, pre)
    tokenizer, description = _load(source, trust_remote_code)
    model = description["model"]
    kind = model.get("type") or ("BPE" if "merges" in model else None)
    tokens, types, notes = _vocabulary(description, rows, source)
    if kind == "BPE" and not model.get("byte_fallback"):
        fields = _byte_level(description, pre, source, notes)
    elif kind in ("BPE", "Unigram"):
        fields = _sentence_piece(description, tokens, types, source, notes)
    else:
        raise SurgeryError(
            f"{source}: llama.cpp has no counterpart of a {kind} tokenizer; it knows byte-level BPE and SentencePiece"
        )
    listed = [
        Field("tokenizer.ggml.tokens", tokens, ARRAY, STRING),
        Field("tokenizer.ggml.token_type", types, ARRAY, INT32),
    ]
    strips = _strips(description, notes)
    return TokenizerFields([*fields, *listed, *_special(tokenizer, description, rows, source)], notes, strips)


def _copied(file: GGUFFile, rows: int, pre: str | None) -> TokenizerFields:
    found = {k: v for k, v in file.metadata.items() if k.startswith("tokenizer.")}
    count = len(found.get("tokenizer.ggml.tokens", ()))
    if count != rows:
        raise SurgeryError(f"{file.path}: its tokenizer has {count:,} tokens, the model {rows:,} embeddings")
    fields = [Field(key, value, *file.kinds[key]) for key, value in found.items()]
    if pre is not None:
        fields = [field for field in fields if field.key != "tokenizer.ggml.pre"]
        fields.append(Field("tokenizer.ggml.pre", pre, STRING))
    name = str(file.metadata.get("general.name", "")).lower()
    return TokenizerFields(fields, [], any(word in name for word in PHI3))


def _load(folder: Path, trust_remote_code: bool) -> tuple[Any, dict[str, Any]]:
    """The tokenizer that transformers loads, and tokenizer.json (what transformers makes, where there is none)."""
    try:
        tokenizer = load_tokenizer(str(folder), trust_remote_code=trust_remote_code)
        path = folder / "tokenizer.json"
        text = path.read_text(encoding="utf-8") if path.exists() else tokenizer.backend_tokenizer.to_str()
        return tokenizer, json.loads(text)
    except CheckpointError:
        raise
    except Exception as error:  # whatever transformers meets in a folder without one, or with a broken one
        raise SurgeryError(
            f"{folder}: its tokenizer cannot be loaded, and a GGUF file carries one; put tokenizer.json and "
            f"tokenizer_config.json beside the weights ({str(error).splitlines()[0] if str(error) else error!r})"
        ) from error


def _vocabulary(description: Mapping[str, Any], rows: int, source: Path) -> tuple[list[str], list[int], list[str]]:
    """Token texts and types [rows], and notes; rows without a token are padded with unused ones."""
    model = description["model"]
    vocab = model["vocab"]
    known = [(piece, i) for i, (piece, _) in enumerate(vocab)] if isinstance(vocab, list) else list(vocab.items())
    byte_tokens = {f"<0x{byte:02X}>" for byte in range(256)} if model.get("byte_fallback") else set()
    found = {i: (text, BYTE if text in byte_tokens else NORMAL) for text, i in known}
    for added in description.get("added_tokens") or ():
        # llama.cpp looks for these before spaces are replaced.
        text = added["content"].replace(SPACE, " ") if byte_tokens and not added["special"] else added["content"]
        found[added["id"]] = (text, CONTROL if added["special"] else USER_DEFINED)
    unknown = model.get("unk_token") or next((text for text, i in known if i == model.get("unk_id")), None)
    found |= {i: (text, UNKNOWN) for i, (text, _) in found.items() if text == unknown}
    beyond = sorted(i for i in found if i >= rows)
    notes = []
    if beyond:
        notes.append(f"the model has no embedding for {len(beyond)} of its tokens, {found[beyond[0]][0]!r} the first")
    if any(SPACE in added["content"] for added in description.get("added_tokens") or ()) and byte_tokens:
        notes.append(f"llama.cpp cuts text that has the sign {SPACE} (U+2581) in it otherwise than this tokenizer")
    ends = sorted(text for text, kind in found.values() if kind == NORMAL and text in END_OF_TEXT)
    if ends:
        notes.append(f"llama.cpp takes {ends[0]!r} in a text for the end of text, to this tokenizer it is plain text")
    tokens, types = zip(*(found.get(i, (f"[PAD{i}]", UNUSED)) for i in range(rows)), strict=True)
    twice = next((text for text, count in Counter(tokens).items() if count > 1), None)
    if twice is not None:
        raise SurgeryError(f"{source}: two tokens are called {twice!r}, which llama.cpp does not load")
    return list(tokens), list(types), notes


def _byte_level(description: Mapping[str, Any], pre: str | None, source: Path, notes: list[str]) -> list[Field]:
    model = description["model"]
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise SurgeryError(f"{source}: llama.cpp cannot do {key} {model[key]!r} of tokenizer.json")
    whole = bool(model.get("ignore_merges"))
    row = BY_NAME.get(pre) if pre else recognise(description.get("pre_tokenizer"), whole)
    if row is None and pre is None:
        raise SurgeryError(
            f"{source}: llama.cpp names its pre-tokenizers, and none of the names known here cuts text as this "
            f"tokenizer.json says ({json.dumps(description.get('pre_tokenizer'), ensure_ascii=False)[:300]}). "
            "If you know which one it is, pass --pre NAME; a wrong name gives a model that reads text wrongly"
        )
    normalizer = _normalizer(description)
    if normalizer == "NFC":
        notes.append(
            "llama.cpp does not compose characters as this tokenizer does (NFC): text with decomposed accents is cut "
            "otherwise; compose it first"
        )
    elif normalizer is not None and pre is None:
        raise SurgeryError(f"{source}: llama.cpp has no counterpart of the normalizer {normalizer} of tokenizer.json")
    if row and row.caveat:
        notes.append(f"llama.cpp's pre-tokenizer {row.name} cuts text with {row.caveat} in places of its own")
    if row and row.whole_words != whole:
        notes += _unreached(model, row.whole_words, row.name)
    merges = [f"{left} {right}" for left, right in pairs_of(model)]
    if not merges:
        raise SurgeryError(f"{source}: its tokens are bytes that nothing merges, and llama.cpp's BPE wants a merge")
    return [
        Field("tokenizer.ggml.model", "gpt2", STRING),
        Field("tokenizer.ggml.pre", pre or (row.name if row else ""), STRING),
        Field("tokenizer.ggml.merges", merges, ARRAY, STRING),
    ]


def _normalizer(description: Mapping[str, Any]) -> str | None:
    """The kind of tokenizer.json's normalizer, None where it does nothing."""
    normalizer = description.get("normalizer")
    if normalizer and normalizer["type"] == "Sequence":
        parts = normalizer["normalizers"]
        return None if not parts else ", ".join(part["type"] for part in parts)
    return normalizer["type"] if normalizer else None


def _unreached(model: Mapping[str, Any], whole_words: bool, name: str) -> list[str]:
    """A note where taking a word that is a token as it is, or merging it, makes a difference."""
    from tokenizers import models

    merged = models.BPE(vocab=model["vocab"], merges=pairs_of(model))
    count = sum(len(merged.tokenize(text)) > 1 for text in model["vocab"])
    if not count:
        return []
    does, instead = ("takes", "merges") if whole_words else ("merges", "takes")
    return [
        f"llama.cpp's pre-tokenizer {name} {does} words that are tokens where this tokenizer {instead} them: "
        f"{count:,} of {len(model['vocab']):,} tokens come out otherwise if they stand alone as a word"
    ]


def _sentence_piece(
    description: Mapping[str, Any], tokens: list[str], types: list[int], source: Path, notes: list[str]
) -> list[Field]:
    model = description["model"]
    prefix = _space_prefix(description)
    if prefix is None:
        raise SurgeryError(
            f"{source}: llama.cpp has no counterpart of this SentencePiece tokenizer's normalizer "
            f"({json.dumps(description.get('normalizer'), ensure_ascii=False)[:200]}) and pre-tokenizer "
            f"({json.dumps(description.get('pre_tokenizer'), ensure_ascii=False)[:200]})"
        )
    if prefix and description.get("pre_tokenizer"):
        notes.append(
            "llama.cpp puts a space behind special tokens and before text that begins with one, where this tokenizer "
            "does not"
        )
    scores = _unigram_scores(model, tokens) if "merges" not in model else _merge_scores(model, tokens, types, source)
    return [
        Field("tokenizer.ggml.model", "llama" if "merges" in model else "t5", STRING),
        Field("tokenizer.ggml.pre", "default", STRING),
        Field("tokenizer.ggml.scores", scores, ARRAY, FLOAT32),
        Field("tokenizer.ggml.add_space_prefix", prefix, BOOL),
    ]


def _space_prefix(description: Mapping[str, Any]) -> bool | None:
    """Whether a space is put before the text; None where tokenizer.json does something else to it, too."""
    normalizer, pre = description.get("normalizer"), description.get("pre_tokenizer")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if normalizer is None and pre and pre["type"] == "Metaspace" and not pre.get("split", True):
        return {"always": True, "first": True, "never": False}[pre.get("prepend_scheme", "always")]
    parts = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer]
    # Once every space is replaced there is none left to split at.
    splits_at_spaces = pre is not None and pre["type"] == "Split" and pre["pattern"] == {"String": " "}
    if pre is not None and not splits_at_spaces:
        return None
    if parts == [{"type": "Prepend", "prepend": SPACE}, replace]:
        return True
    return False if parts == [replace] else None


def _unigram_scores(model: Mapping[str, Any], tokens: list[str]) -> list[float]:
    scores = dict(model["vocab"])
    return [float(scores.get(text, UNREACHED)) for text in tokens]


def _merge_scores(model: Mapping[str, Any], tokens: list[str], types: list[int], source: Path) -> list[float]:
    """A score for each piece that makes SentencePiece's algorithm merge in the order of `merges`.

    SentencePiece joins any two neighbours whose text is a piece, best score first; BPE joins the pairs that are
    listed. The two agree where each piece is listed with every way to halve it, one piece after the other.
    """
    pieces = {text for text, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    place: dict[str, int] = {}
    listed: dict[str, set[str]] = {}
    last = ""
    for left, right in pairs_of(model):
        piece = left + right
        if piece not in pieces:  # found in the text before anything is merged
            continue
        if piece != last and piece in place:
            raise SurgeryError(f"{source}: the merges of piece {piece!r} are not next to one another: {_NOT_SPM}")
        place.setdefault(piece, len(place))
        listed.setdefault(piece, set()).add(left)
        last = piece
    for piece in pieces:
        halves = {piece[:i] for i in range(1, len(piece)) if piece[:i] in pieces and piece[i:] in pieces}
        if halves - listed.get(piece, set()):
            raise SurgeryError(f"{source}: piece {piece!r} has halves that no merge joins: {_NOT_SPM}")
    return [float(-place[text]) if text in place else UNREACHED * len(tokens) for text in tokens]


_NOT_SPM = (
    "llama.cpp's SentencePiece tokenizer would merge in another order than this tokenizer.json. It was not made from a "
    "SentencePiece model, and llama.cpp has no byte-fallback BPE with merges of its own"
)


def _special(tokenizer: Any, description: Mapping[str, Any], rows: int, source: Path) -> list[Field]:
    """Ids of the special tokens, what is put around a text, and the chat template."""
    before, after = _around(description, source)
    ids = {
        "bos": tokenizer.bos_token_id if tokenizer.bos_token_id is not None else before,
        "eos": tokenizer.eos_token_id if tokenizer.eos_token_id is not None else after,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
        "eot": _end_of_turn(source, tokenizer),
    }
    for place, found, name in ((before, ids["bos"], "start"), (after, ids["eos"], "end")):
        if place is not None and place != found:
            raise SurgeryError(
                f"{source}: token {place} is put at the {name} of a text, the {name} token is {found}; llama.cpp "
                "can put no other there"
            )
    fields = [
        Field(f"tokenizer.ggml.{name}_token_id", i, UINT32) for name, i in ids.items() if i is not None and i < rows
    ]
    fields.append(Field("tokenizer.ggml.add_bos_token", before is not None, BOOL))
    fields.append(Field("tokenizer.ggml.add_eos_token", after is not None, BOOL))
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        fields.append(Field("tokenizer.chat_template", template, STRING))
    elif template:
        named = {name: text for name, text in template.items() if name != "default"}
        if "default" in template:
            fields.append(Field("tokenizer.chat_template", template["default"], STRING))
        if named:
            fields.append(Field("tokenizer.chat_templates", list(named), ARRAY, STRING))
            fields += [Field(f"tokenizer.chat_template.{name}", text, STRING) for name, text in named.items()]
    return fields


def _around(description: Mapping[str, Any], source: Path) -> tuple[int | None, int | None]:
    """The tokens that the post-processor puts before and after a text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps({**description, "truncation": None, "padding": None}))
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a", add_special_tokens=True).ids
    for start in (0, 1):
        for end in (0, 1):
            if whole[start : len(whole) - end] == plain:
                return whole[0] if start else None, whole[-1] if end else None
    raise SurgeryError(f"{source}: tokenizer.json puts more than one token before or after a text; llama.cpp cannot")


def _end_of_turn(source: Path, tokenizer: Any) -> int | None:
    """The token that ends a turn of chat, where generation_config.json names one beside the end of text."""
    try:
        found = read_json(source / "generation_config.json").get("eos_token_id")
    except CheckpointError:
        return None
    ids = [i for i in found if type(i) is int and i >= 0] if isinstance(found, list) else []
    others = [i for i in ids if i != tokenizer.eos_token_id]
    return others[0] if others else None


def _strips(description: Mapping[str, Any], notes: list[str]) -> bool:
    """Whether special tokens strip spaces in the way of Phi-3; a note where they do in another."""
    added = description.get("added_tokens") or ()
    right = {token["content"] for token in added if token.get("rstrip")}
    odd = [token["content"] for token in added if token.get("lstrip") or token.get("single_word")]
    texts = {token["content"] for token in added}
    special = {token["content"] for token in added if token["special"]}
    # What llama.cpp looks up by these texts must be there.
    if not odd and texts >= {"</s>", *PHI3_KEEPS} and right == (special | {"</s>"}) - PHI3_KEEPS:
        return True
    if right or odd:
        first = (odd or sorted(right))[0]
        notes.append(f"llama.cpp does not drop the spaces beside special tokens as this tokenizer does ({first!r})")
    return False
