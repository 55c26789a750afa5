"""native: the family's own model_type, where every block has one shape, or is given it with zeros.

Blocks that are all BitNet's have transformers' own bitnet family for theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import lcm
from typing import Any

from llmsurgeon.formats import bitnet_model
from llmsurgeon.formats.form import Body, CheckpointForm
from llmsurgeon.model.families import Family
from llmsurgeon.model.parts import AttentionSpec, FFNSpec
from llmsurgeon.model.spec import LayerSpec, ModelSpec

LOADS = (
    "It is a plain {model_type} checkpoint and loads wherever the original does: transformers, vLLM, llama.cpp's "
    "converter."
)
BITNET_LOADS = (
    "It is a BitNet checkpoint, a Llama with norms before its output projections, in plain numbers: stock transformers "
    "loads it."
)
PADDED = (
    " What was cut is there as zeros: it computes exactly what the cut model does, and is no smaller and no faster "
    "than a model whose blocks all have the largest shape."
)


def misfit(spec: ModelSpec, family: Family, config: Mapping[str, Any]) -> str | None:
    """What no padding can bring into the family's own form, None where all can be."""
    if bitnet_model.misfit(spec, family, config) is None:
        return None
    if spec.block_transformer:
        return f"it is a {spec.block_transformer.sentence()}"
    if reason := _heads_misfit(spec, family, config):
        return reason
    kv_heads = {a.kv_heads for a in spec.attentions}
    widths = {ffn.width for ffn in _ffns(spec)}
    for index, layer in enumerate(spec.layers):
        if layer.branches:
            return f"block {index} runs {len(layer.branches)} blocks in parallel"
        if layer.own_kind:
            return f"block {index} {layer.own_kind}"
        if layer.ffn and (layer.ffn.own_norm or layer.ffn.bias):
            return f"block {index} has a fused FFN with a norm or biases that {family.model_class} does not have"
        if layer.attention and len(kv_heads) > 1 and not family.kv and layer.attention != spec.attentions[0]:
            return f"block {index} has {layer.attention.kv_heads} KV heads, block 0 another number"
        if layer.ffn and family.width_key is None and layer.ffn.width > 4 * spec.hidden:
            return f"block {index} has an FFN of width {layer.ffn.width}, {family.model_class} takes {4 * spec.hidden}"
    if not widths:
        return "no block has an FFN"
    return mixed_windows(config)


def uniform_block(spec: ModelSpec, family: Family) -> LayerSpec:
    """The smallest block that holds each of the spec's: the widest FFN, and KV heads that each number divides."""
    first = spec.attentions[0]
    kv_heads = lcm(*(a.kv_heads for a in spec.attentions))
    width = max(ffn.width for ffn in _ffns(spec)) if family.width_key else 4 * spec.hidden
    return LayerSpec(AttentionSpec(first.heads, kv_heads, first.head_dim), FFNSpec(width))


def uniform_spec(spec: ModelSpec, family: Family) -> ModelSpec:
    """The spec as it is stored: every block has `uniform_block`'s shape, and its own window."""
    shape = uniform_block(spec, family)
    assert shape.attention
    kv_heads = shape.attention.kv_heads
    attentions = [replace(layer.attention or shape.attention, kv_heads=kv_heads) for layer in spec.layers]
    layers = zip(spec.layers, attentions, strict=True)
    return spec.with_layers([replace(layer, attention=attention, ffn=shape.ffn) for layer, attention in layers])


def config_of(spec: ModelSpec, family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the spec as a plain checkpoint of its family, made from the cut source's."""
    block = uniform_block(spec, family)
    assert block.attention and block.ffn
    made = {**config, "model_type": family.model_type, "architectures": [family.model_class]}
    if family.width_key:
        made[family.width_key] = block.ffn.width
    if family.kv_heads_key:
        made[family.kv_heads_key] = block.attention.kv_heads
    if block.attention.heads != made[family.heads_key]:
        made[family.heads_key], made["head_dim"] = block.attention.heads, block.attention.head_dim
    return made


def _heads_misfit(spec: ModelSpec, family: Family, config: Mapping[str, Any]) -> str | None:
    """What keeps the attentions' query heads from the family's own form, None where nothing does."""
    first = spec.attentions[0].heads
    for index, layer in enumerate(spec.layers):
        if layer.attention and layer.attention.heads != first:
            return f"block {index} has {layer.attention.heads} heads, another has {first}"
    if first == config[family.heads_key]:
        return None
    if family.own_head_dim != "declared":
        return f"its {first} heads do not fill the model's width, and {family.model_type}'s config has no head_dim"
    if spec.hidden % first:
        return f"it has {first} heads, and {family.model_class} wants a number that divides its width of {spec.hidden}"
    return None


def mixed_windows(config: Mapping[str, Any]) -> str | None:
    """The first layer that readers who know max_window_layers and not layer_types would get wrong, None without one."""
    types, first = config.get("layer_types"), config.get("max_window_layers")
    if types and first is not None and config.get("use_sliding_window") and "full_attention" in types[first:]:
        index = first + types[first:].index("full_attention")
        return f"block {index} has full attention above one with a window, which max_window_layers cannot express"
    return None


def odd(spec: ModelSpec, family: Family, config: Mapping[str, Any]) -> str | None:
    """What keeps the model from the family's own shape, None where it has it."""
    return _first_odd(spec, family) or _heads_misfit(spec, family, config) or mixed_windows(config)


def _first_odd(spec: ModelSpec, family: Family) -> str | None:
    """What keeps the model from being uniform, None where it is."""

    def shape(layer: LayerSpec) -> Any:
        return layer.attention and layer.attention.shape, layer.ffn

    if spec.block_transformer:
        return f"it is a {spec.block_transformer.sentence()}"
    usual = shape(max(spec.layers, key=lambda b: (b.attention is not None, b.ffn is not None, not b.branches)))
    for index, layer in enumerate(spec.layers):
        if layer.branches:
            return f"block {index} runs {len(layer.branches)} blocks in parallel"
        if layer.attention is None:
            return f"block {index} has no attention"
        if layer.ffn is None:
            return f"block {index} has no FFN"
        if layer.own_kind:
            return f"block {index} {layer.own_kind}"
        if layer.ffn.own_norm or layer.ffn.bias:
            return f"block {index} holds fused FFNs, with a norm or biases that {family.model_type} blocks do not have"
        if family.width_key is None and layer.ffn.width != 4 * spec.hidden:
            return (
                f"block {index} has an FFN of width {layer.ffn.width}; "
                f"{family.model_type} blocks always have {4 * spec.hidden}"
            )
        if shape(layer) != usual:
            first = spec.layers[0]
            return (
                f"block {index} (FFN {layer.ffn.width}, {layer.attention.kv_heads} KV heads) differs from block 0 "
                f"(FFN {first.ffn and first.ffn.width}, {first.attention and first.attention.kv_heads} KV heads)"
            )
    return None


def describe(spec: ModelSpec, family: Family, config: Mapping[str, Any]) -> Body:
    """The model in this form; `config` is the (cut) source's."""
    if bitnet_model.misfit(spec, family, config) is None:
        made = bitnet_model.config_of(spec, config)
        return Body(made, spec, BITNET_LOADS, why="every block is one of BitNet's")
    uneven = odd(spec, family, config) is not None
    loads = LOADS.format(model_type=family.model_type) + (PADDED if uneven else "")
    shaped = uniform_spec(spec, family) if uneven else spec
    return Body(config_of(spec, family, config), shaped, loads, alone=not uneven)


def _unwanted(spec: ModelSpec, family: Family, config: Mapping[str, Any]) -> str | None:
    return bitnet_model.misfit(spec, family, config) and odd(spec, family, config)


def _ffns(spec: ModelSpec) -> list[FFNSpec]:
    return [layer.ffn for layer in spec.layers if layer.ffn]


def read(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config that `family_of` knows: of a checkpoint of transformers' bitnet family its Llama in the surgeon form."""
    return bitnet_model.read(config) if bitnet_model.is_bitnet(config) else config


NATIVE = CheckpointForm(
    name="native",
    misfit=misfit,
    unwanted=_unwanted,
    describe=describe,
    read=read,
    towers=True,
    old_names=True,
)
