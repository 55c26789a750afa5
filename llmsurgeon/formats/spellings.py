"""config.json under its old keys beside its new ones: transformers 4 and many engines read the old ones alone.

transformers 5 keeps all of RoPE under `rope_parameters` and the dtype under `dtype`. A reader that knows neither takes
its defaults, base 10000 and no scaling, without a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmsurgeon.model.families import Family

# What is in rope_parameters beside a scaling.
APART = ("rope_theta", "partial_rotary_factor", "rope_type", "type")
# Phi-3's config class of transformers 4 takes these and no others.
LONGROPE = ("short_factor", "long_factor")
PRETRAINED = "original_max_position_embeddings"


def old_spellings(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The old keys of a (normalised) config: RoPE's base or bases, its share of the head and its scaling; the dtype."""
    made = {"torch_dtype": config["dtype"]} if config.get("dtype") else {}
    if family.full_every_key and config.get("layer_types"):
        made[family.full_every_key] = full_every(config["layer_types"])
    rope = config.get("rope_parameters")
    if not rope:
        return made
    for key, place in family.old_rope:
        value = rope
        for name in place.split("."):
            value = (value or {}).get(name)
        if value is not None:
            made[key] = value
    scaling = scaling_of(rope.get("full_attention") or next(iter(rope.values())) if nested(rope) else rope)
    if family.bare_longrope and scaling and set(scaling) <= {*LONGROPE, "rope_type", PRETRAINED}:
        # What it was pretrained with stands beside it in Phi-3's configs.
        scaling = {"type": scaling["rope_type"], **{key: scaling[key] for key in LONGROPE if key in scaling}}
    return {**made, "rope_scaling": scaling}


def full_every(layer_types: Sequence[str]) -> int | str:
    """n where layers 0, n, 2n ... attend fully and no others; without one a sentence, at which transformers 4 stops."""
    full = [kind == "full_attention" for kind in layer_types]
    for every in range(1, len(full) + 1):
        if full == [index % every == 0 for index in range(len(full))]:
            return every
    return "see layer_types, which transformers 5 reads"


def nested(rope: Mapping[str, Any]) -> bool:
    """Whether each kind of layer has rotary parameters of its own."""
    return all(isinstance(value, Mapping) for value in rope.values())


def scaling_of(rope: Mapping[str, Any]) -> dict[str, Any] | None:
    """What scales rotary positions, as `rope_scaling` had it; None where nothing does."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    more = {key: value for key, value in rope.items() if key not in APART}
    return {"rope_type": kind, **more} if more or kind != "default" else None
