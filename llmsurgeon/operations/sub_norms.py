"""Norms before output projections that become ternary (SubLN): where they stand, and with which gain they begin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from llmsurgeon.operations.base import Computed, NewLayer, Request, Subject

SIZES = "ternary_inputs"


@dataclass(frozen=True)
class Norms(Request):
    """Layer -> paths inside it of the output projections that get a norm."""

    writers: Mapping[int, Sequence[str]]


def places(subject: Subject, chosen: Mapping[int, Sequence[str]]) -> dict[int, tuple[str, ...]]:
    """Layer -> output projections inside it that get a norm: those that become ternary (`chosen`) and have none.

    Raises:
        SurgeryError: the family has no place for norms there, or a layer's parts are not as in the checkpoint.
    """
    if reason := subject.family.no_sub_norm():
        raise subject.refuse(f"ternary: sub_norm: {reason}")
    found: dict[int, tuple[str, ...]] = {}
    for index, names in chosen.items():
        layer = subject.spec.layers[index]
        if len(layer.parents) > 1 or (layer.own_kind and not layer.sub_normed):
            what = layer.own_kind or "holds fused FFNs"
            raise subject.refuse(f"ternary: sub_norm: layer {layer.parents[0]} {what}; name other layers")
        writers = subject.family.sub_norms.items()
        mine = [path for path, (part, _) in writers if f"{path}.weight" in names and part not in layer.sub_normed]
        found[index] = tuple(mine)
    return {index: paths for index, paths in found.items() if paths}


def with_norms(subject: Subject, layer: NewLayer, paths: tuple[str, ...]) -> NewLayer:
    """The layer with an RMSNorm before the projections at `paths`, whose gain is the size of what they read."""
    sizes, number = subject.score(SIZES, "ternary: sub_norm"), layer.spec.parents[0]
    spec, tensors = layer.spec, dict(layer.tensors)
    for path in paths:
        part, norm = subject.family.sub_norms[path]
        own = {part: replace(getattr(spec, part), sub_norm=True)}
        spec = replace(spec, **own)
        weight = subject.tensors(subject.position(number))[f"{path}.weight"]
        tensors[f"{norm}.weight"] = Computed((weight,), partial(_gain, sizes[number][path]))
    return NewLayer(spec, tensors)


def _gain(size: float, weight_OI: Tensor) -> Tensor:
    return torch.full_like(weight_OI[0], size)
