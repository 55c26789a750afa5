"""What tensors are called: in files of all ages, and by today's classes, whose names operations work with."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import Tensor

from llmsurgeon.checkpoint.transform import TransformedWeights, WeightTransform, remove, rename
from llmsurgeon.formats.experts import file_form
from llmsurgeon.model.families import Family


def canonical(weights: Mapping[str, Tensor], family: Family, repeated: Collection[str] = ()) -> TransformedWeights:
    """The weights under the names of today's classes: old buffers dropped, old prefixes and names mended.

    repeated: names of today's that only repeat others, as a tied head does; they are dropped.
    """
    transforms: list[WeightTransform] = []
    legacy = dict(family.legacy_names)
    weights = file_form(weights, family)
    prefix = _missing_prefix(weights, family)
    for name in weights:
        target = legacy.get(name, name)
        for pattern, replacement in family.old_names:
            target = re.sub(pattern, replacement, target)
        if prefix and not target.startswith(f"{family.head}."):
            target = prefix + target
        if family.heads:
            target = _with_prefix(target, family)
        if any(re.search(pattern, name) for pattern in family.ignored) or target in repeated:
            transforms.append(remove(name))
        elif target != name:
            transforms.append(rename(name, target))
    return TransformedWeights(weights, transforms)


def _missing_prefix(weights: Mapping[str, Tensor], family: Family) -> str:
    """The prefix that a decoder's class puts before its body's names, where a file of the body alone has none."""
    prefix = family.layers.partition(".")[0] + "."
    if family.heads or any(name.startswith(prefix) for name in weights):
        return ""
    inside = {path.removeprefix(prefix).partition(".")[0] for path in (family.layers, family.embedding)}
    return prefix if any(name.partition(".")[0] in inside for name in weights) else ""


def _with_prefix(name: str, family: Family) -> str:
    """The name with or without the encoder's prefix, as the checkpoint's class has it: files come in either form."""
    bare = name.removeprefix(family.prefix)
    if not family.layers.startswith(family.prefix):
        return bare
    own = {path.removeprefix(family.prefix).partition(".")[0] for path in (family.layers, family.embedding)}
    return family.prefix + bare if bare.partition(".")[0] in own | {"pooler"} else name


def legacy(weights: Mapping[str, Tensor], family: Family) -> TransformedWeights:
    """Today's names back to the published ones, for formats that other engines read."""
    published = {today: old for old, today in family.legacy_names}
    return TransformedWeights(weights, [rename(name, published[name]) for name in weights if name in published])
