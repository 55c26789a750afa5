"""Token ids in configs: which a config names, and the same config with the ids that they get."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

# Keys under which configs, generation configs and processors hold ids, one or a list, nested or not.
ID_KEYS = re.compile(
    r"(^|_)token(_id|_ids|_index|_indices)$|^(begin_)?suppress_tokens$|^forced_decoder_ids$|^bad_words_ids$"
    r"|^force_words_ids$|^no_speech_token_id$|^(pad|bos|eos|unk|sep|cls|mask)_id$"
)
# Generation settings that map sequences of ids to something.
SEQUENCE_KEYS = {"sequence_bias"}


def named_ids(config: Any) -> set[int]:
    """Every token id that a config names; negative numbers stand for none."""
    found: set[int] = set()

    def note(i: int) -> int:
        found.add(i)
        return i

    moved_config(config, note)
    return {i for i in found if i >= 0}


def moved_ids(config: Any, moved: Mapping[int, int]) -> Any:
    """The config with each id replaced by its new one; what is no token of the table stays as it is."""
    return moved_config(config, lambda i: moved.get(i, i))


def moved_config(config: Any, new: Callable[[int], int]) -> Any:
    """The config with `new` called on each token id."""
    if isinstance(config, Mapping):
        return {key: _moved_entry(str(key), value, new) for key, value in config.items()}
    if isinstance(config, list):
        return [moved_config(value, new) for value in config]
    return config


def _moved_entry(key: str, value: Any, new: Callable[[int], int]) -> Any:
    if ID_KEYS.search(key):
        return _moved_numbers(value, new)
    if key in SEQUENCE_KEYS and isinstance(value, list):
        # [[ids, bias], ...]
        return [[_moved_numbers(pair[0], new), *pair[1:]] if isinstance(pair, list) else pair for pair in value]
    return moved_config(value, new)


def _moved_numbers(value: Any, new: Callable[[int], int]) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return new(value) if value >= 0 else value
    return [_moved_numbers(each, new) for each in value] if isinstance(value, list) else value
