"""A model's cache of keys, values and states, by the name that the installed transformers has for it.

transformers 5.24 renamed `past_key_values` to `cache`, in what models take and in what they give.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Collection
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAMES = ("cache", "past_key_values")


def cached_call(model: PreTrainedModel, cache: Any = None, **inputs: Any) -> tuple[Any, Any]:
    """(a model's output, the cache behind it) of a call that reads `cache`, None for an empty one.

    Raises:
        TypeError: the model takes a cache, or gives one, under no name that is known here.
    """
    given = {} if cache is None else {_taken(model.__class__): cache}
    output = model(**inputs, **given, use_cache=True)
    return output, output[_given(output.__class__)]


@lru_cache
def _taken(model_class: type) -> str:
    return _known(model_class, inspect.signature(model_class.forward).parameters)  # type: ignore[attr-defined]


@lru_cache
def _given(output_class: type) -> str:
    return _known(output_class, [field.name for field in dataclasses.fields(output_class)])


def _known(owner: type, names: Collection[str]) -> str:
    for name in NAMES:
        if name in names:
            return name
    raise TypeError(f"{owner.__name__} has no cache under a name that is known here ({', '.join(NAMES)})")
