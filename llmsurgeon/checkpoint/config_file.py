"""config.json as it is read: a JSON object whose fields that this tool looks at are of the kinds that it expects.

All other fields belong to transformers' config class of the family, which checks them itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from llmsurgeon.boundary.foreign import kind_of, read_json
from llmsurgeon.boundary.limits import LARGEST_SIZE, MOST_EXPERTS, MOST_LAYERS
from llmsurgeon.errors import CheckpointError


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _object(value: Any) -> bool:
    return isinstance(value, dict)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _positive(value: Any) -> bool:
    return _whole(value) and value > 0


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _dtype(value: Any) -> bool:
    return _text(value) and isinstance(getattr(torch, value.removeprefix("torch."), None), torch.dtype)


def _list_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(holds, value))


Kind = tuple[str, Callable[[Any], bool]]
TEXT: Kind = ("a text", _text)
OBJECT: Kind = ("an object", _object)
WHOLE: Kind = ("a whole number", _whole)
POSITIVE: Kind = ("a whole number of 1 or more", _positive)
FINITE: Kind = ("a finite number", _finite)
FLAG: Kind = ("true or false", _flag)
DTYPE: Kind = ("the name of a dtype, e.g. bfloat16", _dtype)
TEXTS: Kind = ("a list of texts", _list_of(_text))
OBJECTS: Kind = ("a list of objects", _list_of(_object))
NUMBERS: Kind = ("a list of whole numbers", _list_of(lambda value: _whole(value) or _flag(value)))
LAYERS: Kind = ("a list of whole numbers", _list_of(_whole))
PARENTS: Kind = ("a list of lists of whole numbers", _list_of(_list_of(_whole)))

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
    "block_parents": PARENTS,
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


# The same of an entry of block_configs, of its two parts, and of a Nemotron-NAS model's sizes.
ENTRY: dict[str, Kind] = {"attention": OBJECT, "ffn": OBJECT, "parents": LAYERS, "parallel": OBJECTS}
HEADS = ("n_heads_in_group", "num_attention_heads", "num_key_value_heads")
WIDTHS = ("intermediate_size", "num_experts", "num_experts_per_tok")
SWITCHES = ("no_op", "replace_with_linear", "sub_norm", "own_norm", "bias", "gated", "in_bias", "out_bias")
ATTENTION: dict[str, Kind] = {
    "kind": TEXT,
    "linears": TEXT,
    "width": POSITIVE,
    **dict.fromkeys(HEADS, POSITIVE),
    **dict.fromkeys(SWITCHES, FLAG),
}
FFN: dict[str, Kind] = {
    "kind": TEXT,
    "form": TEXT,
    "projections": TEXTS,
    "ffn_mult": FINITE,
    **dict.fromkeys(WIDTHS, POSITIVE),
    **dict.fromkeys(SWITCHES, FLAG),
    **dict.fromkeys(("depth", "leaf_width", "shared", "trees"), WHOLE),
}
NEMOTRON_NAS = dict.fromkeys(("hidden_size", "num_attention_heads", "num_hidden_layers"), POSITIVE)
LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# Names of fields, first match first, and the most that they may say (or, for lists, how many entries they may have).
SIZES = (
    (r"^block_configs$|^layer_types$|^(num_hidden|n|num)_layers?$", MOST_LAYERS),
    (r"experts", MOST_EXPERTS),
    (r"^(n|num|max)_|_(size|dim|heads|layers|positions|width|inner|embd)$|^head_dim$", LARGEST_SIZE),
)


def read_config_file(path: Path) -> dict[str, Any]:
    """The contents of config.json, nothing filled in.

    Raises:
        CheckpointError: not readable, not a JSON object, or a field of another kind than it must be.
    """
    config = read_json(path)
    check_fields(config, str(path))
    check_sizes(config, str(path))
    return config


def check_sizes(config: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError for a model so large that building it empty would take hours, or all memory.

    Towers and the like, which are objects inside the config, are looked at, too.
    """
    for key, value in config.items():
        if isinstance(value, dict):
            check_sizes(value, f"{where}: {key}")
        most = next((most for pattern, most in SIZES if re.search(pattern, key)), None)
        count = len(value) if isinstance(value, list) else value
        if most is not None and _whole(count) and count > most:
            raise CheckpointError(
                f"{where}: {key} {'has' if isinstance(value, list) else 'is'} {count:,}"
                f"{' entries' if isinstance(value, list) else ''}, expected at most {most:,}; correct it there"
            )


def check_layers(config: Mapping[str, Any], tensors: int, where: str) -> None:
    """Raise CheckpointError where the config has more layers than its weight files have tensors."""
    for key, value in config.items():
        if key in LAYER_KEYS and _whole(value) and value > tensors:
            raise CheckpointError(f"{where}: {key} is {value:,}, and the weights have {tensors:,} tensors in all")


def check_fields(config: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError where a field that this tool looks at is of another kind, in `text_config`, too."""
    _check(config, FIELDS, f"{where}: ")
    if config.get("model_type") == "nemotron-nas":
        _check(config, NEMOTRON_NAS, f"{where}: ", required=tuple(NEMOTRON_NAS))
    for index, entry in enumerate(config.get("block_configs") or ()):
        _check_entry(entry, f"{where}: block_configs[{index}].")
    if inner := config.get("text_config"):
        check_fields(inner, f"{where}: text_config")


def _check_entry(entry: Mapping[str, Any], where: str) -> None:
    _check(entry, ENTRY, where)
    branches = entry.get("parallel") or ()
    for name, fields in (("attention", ATTENTION), ("ffn", FFN)):
        if not branches or entry.get(name) is not None:
            _check(entry, ENTRY, where, required=(name,))
            _check(entry[name], fields, f"{where}{name}.", required=("no_op",))
    for index, branch in enumerate(branches):
        _check_entry(branch, f"{where}parallel[{index}].")


def _check(values: Mapping[str, Any], fields: Mapping[str, Kind], where: str, required: tuple[str, ...] = ()) -> None:
    for key, (expected, holds) in fields.items():
        value = values.get(key)
        if not holds(value) if value is not None else key in required:
            raise CheckpointError(f"{where}{key} must be {expected}, found {kind_of(value)}; correct it there")
