"""transformers' own bitnet family: a Llama whose output projections all read through an RMSNorm (SubLN).

Its class computes any such Llama exactly, ternary or not: the activation is a setting, and tensors are called as here.
Read, it is a Llama in the surgeon form. Packing of ternary linears (format bitnet) goes on top of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmsurgeon.model.families import SURGEON_PREFIX, Family
from llmsurgeon.model.spec import ModelSpec, to_block_configs

MODEL_TYPE, MODEL_CLASS = "bitnet", "BitNetForCausalLM"
FAMILIES = ("llama", "mistral")


def is_bitnet(config: Mapping[str, Any]) -> bool:
    """True for the config of transformers' bitnet family."""
    return config.get("model_type") == MODEL_TYPE


def misfit(spec: ModelSpec, family: Family, config: Mapping[str, Any]) -> str | None:
    """Why transformers' bitnet class cannot compute this model, None where it can."""
    if family.model_type not in FAMILIES or spec.block_transformer or config.get("mlp_bias"):
        return "it is a Llama without biases in its FFNs"
    shapes = {(b.attention and b.attention.shape, b.ffn and b.ffn.width) for b in spec.layers}
    for index, layer in enumerate(spec.layers):
        attention = layer.attention
        if layer.sub_normed != ("attention", "ffn") or attention is None or len(shapes) > 1:
            return f"all its blocks have one shape and a norm before both output projections, block {index} has not"
        if attention.window is not None:
            return f"block {index} has a sliding window"
        if attention.heads * attention.head_dim != spec.hidden:
            return f"its heads fill the model's width of {spec.hidden}"
    return None


def config_of(spec: ModelSpec, config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model that fits, made from the (cut) source's."""
    attention, ffn = spec.layers[0].attention, spec.layers[0].ffn
    assert attention and ffn
    sizes = {"num_key_value_heads": attention.kv_heads, "intermediate_size": ffn.width}
    return {**config, **sizes, "model_type": MODEL_TYPE, "architectures": [MODEL_CLASS]}


def read(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the same model as Llama in the surgeon format, which the rest of the tool works with."""
    from transformers import BitNetConfig

    from llmsurgeon.model.families.llama import LLAMA

    values = {k: v for k, v in config.items() if k not in ("model_type", "architectures", "auto_map")}
    known = BitNetConfig.from_dict(values).to_dict()
    blocks = to_block_configs(LLAMA.describe(known))
    for layer in blocks:
        layer["attention"]["sub_norm"] = layer["ffn"]["sub_norm"] = True
    return {**known, "model_type": SURGEON_PREFIX + "llama", "architectures": None, "block_configs": blocks}
