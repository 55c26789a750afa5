"""config.json as it is read: a JSON object whose fields that this tool looks at are of the kinds that it expects.

All other fields belong to transformers' config class of the family, which checks them itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from llmsurgeon.boundary import kind_of, read_json
from llmsurgeon.errors import CheckpointError


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _object(value: Any) -> bool:
    return isinstance(value, dict)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _dtype(value: Any) -> bool:
    return _text(value) and isinstance(getattr(torch, value.removeprefix("torch."), None), torch.dtype)


def _list_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(holds, value))


Kind = tuple[str, Callable[[Any], bool]]
TEXT: Kind = ("a text", _text)
OBJECT: Kind = ("an object", _object)
WHOLE: Kind = ("a whole number", _whole)
FLAG: Kind = ("true or false", _flag)
DTYPE: Kind = ("the name of a dtype, e.g. bfloat16", _dtype)
TEXTS: Kind = ("a list of texts", _list_of(_text))
OBJECTS: Kind = ("a list of objects", _list_of(_object))
NUMBERS: Kind = ("a list of whole numbers", _list_of(lambda value: _whole(value) or _flag(value)))

# Null, and a field that is not there, always pass: defaults are filled in where they are needed.
FIELDS: dict[str, Kind] = {
    "model_type": TEXT,
    "architectures": TEXTS,
    "auto_map": OBJECT,
    "quantization_config": OBJECT,
    "dtype": DTYPE,
    "torch_dtype": DTYPE,
    "text_config": OBJECT,
    "vision_config": OBJECT,
    "block_configs": OBJECTS,
    "block_transformer": OBJECT,
    "layer_types": TEXTS,
    "no_rope_layers": NUMBERS,
    "rope_scaling": OBJECT,
    "rope_parameters": OBJECT,
    "tie_word_embeddings": FLAG,
    "max_position_embeddings": WHOLE,
    "sliding_window": WHOLE,
    "head_dim": WHOLE,
    "vocab_size": WHOLE,
}


def read_config_file(path: Path) -> dict[str, Any]:
    """The contents of config.json, nothing filled in.

    Raises:
        CheckpointError: not readable, not a JSON object, or a field of another kind than it must be.
    """
    config = read_json(path)
    check_fields(config, str(path))
    return config


def check_fields(config: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError where a field that this tool looks at is of another kind, in `text_config`, too."""
    for key, (expected, holds) in FIELDS.items():
        value = config.get(key)
        if value is not None and not holds(value):
            raise CheckpointError(f"{where}: {key} must be {expected}, found {kind_of(value)}; correct it there")
    if inner := config.get("text_config"):
        check_fields(inner, f"{where}: text_config")
