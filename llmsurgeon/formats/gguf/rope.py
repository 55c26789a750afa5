"""Rotary positions as llama.cpp has them: metadata, and tensors of factors on the frequencies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmsurgeon.checkpoint.gguf.architectures import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS, Architecture
from llmsurgeon.errors import SurgeryError
from llmsurgeon.model.parts import AttentionSpec
from llmsurgeon.model.spec import ModelSpec

Config = Mapping[str, Any]


def any_attention(spec: ModelSpec) -> AttentionSpec:
    """The first attention: llama.cpp takes the width of its heads for all."""
    return next(layer.attention for layer in spec.layers if layer.attention)


def rope(
    architecture: Architecture, config: Config, spec: ModelSpec, notes: list[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Keys of the rotary positions, and tensors of factors on their frequencies."""
    if architecture.rope == "none":
        return {}, {}
    parameters = config["rope_parameters"]
    keys: dict[str, Any] = {}
    if "full_attention" in parameters:  # Gemma 3: blocks that slide turn at a base of their own
        local = parameters["sliding_attention"]
        if local.get("rope_type", "default") != "default":
            raise SurgeryError(f"llama.cpp has no RoPE scaling {local['rope_type']!r} in sliding blocks")
        keys["rope.freq_base_swa"] = float(local["rope_theta"])
        parameters = parameters["full_attention"]
    dimensions = int(any_attention(spec).head_dim * parameters.get("partial_rotary_factor", 1.0))
    keys |= {"rope.freq_base": float(parameters["rope_theta"]), "rope.dimension_count": dimensions}
    scaling = parameters.get("rope_type", "default")
    if scaling == "default":
        return keys, {}
    if scaling == "llama3" and architecture.rope == "pairs":
        return keys, {ROPE_FACTORS: llama3_factors(parameters, dimensions)}
    if scaling == "linear":
        return keys | {"rope.scaling.type": "linear", "rope.scaling.factor": float(parameters["factor"])}, {}
    if scaling == "yarn":
        return keys | _yarn(parameters, spec), {}
    if scaling == "longrope" and architecture.name == "phi3":
        return _longrope(keys, config, parameters, spec, notes)
    raise SurgeryError(f"llama.cpp's {architecture.name} has no RoPE scaling {scaling!r}")


def llama3_factors(parameters: Config, dimensions: int) -> Tensor:
    """What divides each frequency in Llama 3.1's RoPE scaling (`_compute_llama3_parameters` of transformers)."""
    low, high, factor = (parameters[k] for k in ("low_freq_factor", "high_freq_factor", "factor"))
    original = parameters["original_max_position_embeddings"]
    exponents = torch.arange(0, dimensions, 2, dtype=torch.float64) / dimensions
    turns = original / (2 * math.pi * parameters["rope_theta"] ** exponents)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def _yarn(parameters: Config, spec: ModelSpec) -> dict[str, Any]:
    """YaRN (arXiv 2309.00071). llama.cpp multiplies its own 0.1 ln(factor) + 1 by `attn_factor`."""
    # llama.cpp reads no betas from the file.
    usual = {"mscale": None, "mscale_all_dim": None, "truncate": True, "beta_fast": 32, "beta_slow": 1}
    for key, value in usual.items():
        if parameters.get(key, value) not in (value, None):
            raise SurgeryError(f"llama.cpp has no YaRN with {key} {parameters[key]}")
    factor = float(parameters["factor"])
    keys: dict[str, Any] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": int(
            parameters.get("original_max_position_embeddings") or spec.max_positions or 2048
        ),
    }
    if parameters.get("attention_factor") is not None:
        keys["rope.scaling.attn_factor"] = parameters["attention_factor"] / (0.1 * math.log(factor) + 1)
    return keys


def _longrope(
    keys: dict[str, Any], config: Config, parameters: Config, spec: ModelSpec, notes: list[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """LongRoPE (arXiv 2402.13753): one set of factors up to the original context, another beyond."""
    original = int(parameters.get("original_max_position_embeddings") or config["original_max_position_embeddings"])
    ratio = (spec.max_positions or original) / original
    attention = parameters.get("attention_factor") or (
        math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    )
    notes.append(
        f"llama.cpp takes LongRoPE's long factors once its context (-c) is larger than {original} tokens, transformers "
        "once the text is"
    )
    keys = keys | {
        "rope.scaling.original_context_length": original,
        "rope.scaling.attn_factor": float(attention),
    }
    factors = {LONG_FACTORS: parameters["long_factor"], SHORT_FACTORS: parameters["short_factor"]}
    return keys, {name: torch.tensor(values, dtype=torch.float32) for name, values in factors.items()}
