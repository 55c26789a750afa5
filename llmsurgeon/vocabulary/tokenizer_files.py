"""The tokenizer's files for a smaller vocabulary: tokenizer.json, and those beside it that repeat it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from llmsurgeon.boundary.foreign import foreign, json_object, read_text
from llmsurgeon.checkpoint.tokenizer_json import pairs_of, tokens_of
from llmsurgeon.errors import SurgeryError
from llmsurgeon.vocabulary.ids import moved_ids
from llmsurgeon.vocabulary.keep import Vocabulary

TOKENIZER = "tokenizer.json"
# The same vocabulary in forms that are not rewritten; what reads them would take the parent's ids.
LEFT_OUT = ("*.model", "*.tiktoken", "tekken.json", "vocab.bpe")


def read_description(files: Mapping[str, Path], where: str) -> dict[str, Any]:
    """tokenizer.json among a checkpoint's files.

    Raises:
        SurgeryError: there is none.
        CheckpointError: it is damaged.
    """
    if TOKENIZER not in files:
        slow = sorted(name for name in files if any(fnmatch(name, pattern) for pattern in (*LEFT_OUT, "vocab*")))
        if slow:
            raise SurgeryError(
                f"{where}: its tokenizer ({', '.join(slow)}) has no {TOKENIZER}, and that is what is trimmed; load it "
                "with transformers' AutoTokenizer and save_pretrained it beside the weights, which writes one"
            )
        raise SurgeryError(f"{where}: it has no tokenizer, so nobody can say which rows its tokens are")
    from tokenizers import Tokenizer

    text = read_text(files[TOKENIZER])
    description = json_object(text, str(files[TOKENIZER]))
    with foreign(str(files[TOKENIZER]), "not a tokenizer", "download it again"):
        # The library that owns the format says whether every part has the form that is taken for granted below.
        Tokenizer.from_str(text)
        if not isinstance(description["model"]["vocab"], dict | list):
            raise TypeError("model.vocab is neither a mapping nor a list")
    return description


def trimmed_description(description: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """tokenizer.json with the kept tokens alone, under their new ids."""
    moved = vocabulary.moved
    made = {**description, "model": _model(description["model"], moved)}
    made["added_tokens"] = [
        {**entry, "id": moved[entry["id"]]} for entry in description.get("added_tokens") or () if entry["id"] in moved
    ]
    if description.get("post_processor"):
        made["post_processor"] = _processor(description["post_processor"], moved)
    if description.get("padding"):
        made["padding"] = moved_ids(description["padding"], moved)
    return made


def _model(model: Mapping[str, Any], moved: Mapping[int, int]) -> dict[str, Any]:
    made = dict(model)
    if isinstance(model["vocab"], list):
        made["vocab"] = [entry for i, entry in enumerate(model["vocab"]) if i in moved]
        if model.get("unk_id") is not None:
            made["unk_id"] = moved[model["unk_id"]]
        return made
    kept = sorted((moved[i], token) for token, i in tokens_of(model).items() if i in moved)
    made["vocab"] = {token: i for i, token in kept}
    if "merges" in model:
        there = made["vocab"].keys()
        made["merges"] = [
            merge
            for merge, (left, right) in zip(model["merges"], pairs_of(model), strict=True)
            if left in there and right in there and left + right in there
        ]
    return made


def _processor(processor: Any, moved: Mapping[int, int]) -> Any:
    """A post-processor, or a sequence of them, with the ids of the tokens that it puts around a text."""
    made = dict(processor)
    if "processors" in made:
        made["processors"] = [_processor(each, moved) for each in made["processors"]]
    if isinstance(made.get("special_tokens"), dict):
        made["special_tokens"] = {
            token: {**entry, "ids": [moved.get(i, i) for i in entry["ids"]]}
            for token, entry in made["special_tokens"].items()
        }
    for key in ("sep", "cls"):
        if isinstance(made.get(key), list) and len(made[key]) == 2:
            made[key] = [made[key][0], moved.get(made[key][1], made[key][1])]
    return made


def write_trimmed(
    files: Mapping[str, Path], description: dict[str, Any], vocabulary: Vocabulary, folder: Path
) -> list[str]:
    """Write all of a checkpoint's small files to `folder`, those that name tokens rewritten; the names left out."""
    trimmed = trimmed_description(description, vocabulary)
    left_out = []
    for name, path in sorted(files.items()):
        if any(fnmatch(name, pattern) for pattern in LEFT_OUT):
            left_out.append(name)
            continue
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        rewrite = REWRITTEN.get(name)
        if rewrite is None:
            target.write_bytes(path.read_bytes())
            continue
        text = read_text(path)
        target.write_text(rewrite(text, trimmed, vocabulary), encoding="utf-8")
    return left_out


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


def with_ids(text: str, trimmed: dict[str, Any], vocabulary: Vocabulary) -> str:
    """A JSON file with ids under the usual keys, and added tokens by id."""
    config = moved_ids(json_object(text, "a JSON file beside the tokenizer"), vocabulary.moved)
    if isinstance(config.get("added_tokens_decoder"), dict):
        moved = vocabulary.moved
        config["added_tokens_decoder"] = {
            str(moved[int(i)]): entry
            for i, entry in config["added_tokens_decoder"].items()
            if i.isdecimal() and int(i) in moved
        }
    return _dumped(config)


def _vocab_json(text: str, trimmed: dict[str, Any], vocabulary: Vocabulary) -> str:
    """{token: id}."""
    moved = vocabulary.moved
    return _dumped({token: moved[i] for token, i in json_object(text, "vocab.json").items() if i in moved})


def _vocab_txt(text: str, trimmed: dict[str, Any], vocabulary: Vocabulary) -> str:
    """A token a line, by id."""
    lines = text.removesuffix("\n").split("\n")
    return "\n".join(lines[i] for i in vocabulary.kept if i < len(lines)) + "\n"


def _merges_txt(text: str, trimmed: dict[str, Any], vocabulary: Vocabulary) -> str:
    """A merge a line, behind a line with the version."""
    head = [line for line in text.split("\n")[:1] if line.startswith("#version")]
    return "\n".join([*head, *(" ".join(pair) for pair in pairs_of(trimmed["model"]))]) + "\n"


Rewrite = Callable[[str, dict[str, Any], Vocabulary], str]
REWRITTEN: dict[str, Rewrite] = {
    TOKENIZER: lambda text, trimmed, vocabulary: json.dumps(trimmed, ensure_ascii=False),
    "tokenizer_config.json": with_ids,
    "generation_config.json": with_ids,
    "processor_config.json": with_ids,
    "preprocessor_config.json": with_ids,
    "added_tokens.json": _vocab_json,
    "vocab.json": _vocab_json,
    "vocab.txt": _vocab_txt,
    "merges.txt": _merges_txt,
}
