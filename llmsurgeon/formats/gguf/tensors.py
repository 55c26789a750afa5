"""The edits that bring a family's weights into llama.cpp's names, order and scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from llmsurgeon.checkpoint.gguf.architectures import Architecture, file_name, order, tensor_map
from llmsurgeon.checkpoint.transform import WeightTransform, rename
from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats.gguf.rope import any_attention
from llmsurgeon.model.families import Family
from llmsurgeon.model.spec import ModelSpec

Config = Mapping[str, Any]


def transforms_of(
    architecture: Architecture, config: Config, family: Family, spec: ModelSpec, weights: Mapping[str, Tensor]
) -> list[WeightTransform]:
    names = tensor_map(architecture.name, len(spec.layers))
    made: list[WeightTransform] = []
    stacked: dict[str, dict[int, str]] = {}
    for name in weights:
        target, part = file_name(names, name)
        if target is None:
            raise SurgeryError(f"tensor {name} has no place in llama.cpp's {architecture.name}")
        if part is not None:
            stacked.setdefault(target, {})[part] = name
            continue
        made.append(_transform(architecture, config, spec, name, target))
    for target, parts in stacked.items():
        made.append(WeightTransform(tuple(parts[i] for i in sorted(parts)), (target,), _stack))
    if architecture.own_head and f"{family.head}.weight" not in weights:
        made.append(rename(f"{family.embedding}.weight", "output.weight"))
    return made


def _transform(architecture: Architecture, config: Config, spec: ModelSpec, name: str, target: str) -> WeightTransform:
    """The edit that makes one tensor."""
    part = target.split(".")[-2]
    ratio = _query_ratio(architecture, config, spec) if part in ("attn_q", "attn_q_norm") else 1.0
    if architecture.gains_from_one and part.endswith("norm"):
        return WeightTransform((name,), (target,), _gain(ratio))
    # Gemma 3 norms its queries, so there the gain of that norm has the ratio.
    if ratio != 1.0 and architecture.name != "gemma3":
        return WeightTransform((name,), (target,), _times(ratio))
    attention = spec.layers[int(target.split(".")[1])].attention if target.startswith("blk.") else None
    found = order(architecture, target, *(attention.shape if attention else (1, 1, 1)))
    return WeightTransform((name,), (target,), found.there) if found else rename(name, target)


def _query_ratio(architecture: Architecture, config: Config, spec: ModelSpec) -> float:
    """What queries are multiplied by, so that the scale that llama.cpp uses comes out as the config's."""
    if not architecture.wide_layers:
        return 1.0
    attention = any_attention(spec)
    width = architecture.query_width(len(spec.layers), spec.hidden, attention.heads, attention.head_dim)
    return math.sqrt(width / config["query_pre_attn_scalar"])


def _gain(ratio: float) -> Callable[[Tensor], Tensor]:
    return lambda weight: (1 + weight.float()) * ratio


def _times(ratio: float) -> Callable[[Tensor], Tensor]:
    return lambda weight: weight.float() * ratio


def _stack(*parts: Tensor) -> Tensor:
    return torch.stack(parts)
