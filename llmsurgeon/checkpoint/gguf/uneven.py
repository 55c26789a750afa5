"""llama.cpp's architecture `deci`: Llama's block with a width, a number of heads, or no attention, of its own.

Its metadata as a config in the surgeon format, and the names and shapes of its tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from llmsurgeon.errors import CheckpointError


def uneven_config(metadata: Mapping[str, Any], tensors: Collection[str], where: Path) -> dict[str, Any]:
    """config.json of a `deci` file, dtype and RoPE scaling apart.

    Raises:
        CheckpointError: a value is missing or contradicts another.
    """
    layers = _number(metadata, "block_count", where)
    heads = _per_layer(metadata, "attention.head_count", layers, where)
    kv_heads = _per_layer(metadata, "attention.head_count_kv", layers, where)
    widths = _per_layer(metadata, "feed_forward_length", layers, where)
    hidden, head_dim = _number(metadata, "embedding_length", where), _number(metadata, "attention.key_length", where)
    if not any(heads):
        raise CheckpointError(f"{where}: no block has attention")
    for index, (own, kv) in enumerate(zip(heads, kv_heads, strict=True)):
        if bool(own) != bool(kv) or (kv and own % kv):
            what = "linear attention" if own and not kv else f"{own} heads and {kv} KV heads"
            raise CheckpointError(f"{where}: block {index} has {what}, which is not supported")
    # Qwen2 has biases on queries, keys and values alone, a Llama with biases on the output, too.
    biased = any(name.endswith("attn_q.bias") for name in tensors)
    qwen2 = biased and not any(name.endswith("attn_output.bias") for name in tensors)
    if qwen2 and hidden != head_dim * max(heads):
        raise CheckpointError(f"{where}: biases as in Qwen2, whose heads fill the model's width; these do not")
    family = "qwen2" if qwen2 else "llama"
    common = {
        "model_type": f"surgeon_{family}",
        "architectures": ["SurgeonQwen2ForCausalLM" if qwen2 else "SurgeonLlamaForCausalLM"],
        "block_configs": [_block(*sizes, hidden) for sizes in zip(heads, kv_heads, widths, strict=True)],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": max(widths),
        "num_attention_heads": max(heads),
        "num_key_value_heads": max(kv_heads),
        "hidden_act": "silu",
        "max_position_embeddings": _number(metadata, "context_length", where),
        "rms_norm_eps": metadata.get("deci.attention.layer_norm_rms_epsilon", 1e-5),
        "rope_parameters": {"rope_type": "default", "rope_theta": metadata.get("deci.rope.freq_base", 10000.0)},
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    ids = {f"{key}_token_id": metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos")}
    ids["pad_token_id"] = metadata.get("tokenizer.ggml.padding_token_id")
    if qwen2:
        return common | ids | {"use_sliding_window": False}
    mlp_bias = any(name.endswith("ffn_up.bias") for name in tensors)
    return common | ids | {"head_dim": head_dim, "attention_bias": biased, "mlp_bias": mlp_bias}


def uneven_shapes(config: Mapping[str, Any], head_dim: int, vocab: int) -> dict[str, tuple[int, ...]]:
    """Name (as in transformers) -> shape of every tensor of a `deci` model."""
    hidden = config["hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}

    def linear(name: str, out: int, read: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (out, read)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    qwen2 = config["model_type"] == "surgeon_qwen2"
    biased = qwen2 or config["attention_bias"]
    for index, block in enumerate(config["block_configs"]):
        at, attention, ffn = f"model.layers.{index}.", block["attention"], block["ffn"]
        if not attention["no_op"]:
            queries, keys = (attention[f"num_{kind}_heads"] * head_dim for kind in ("attention", "key_value"))
            shapes[at + "input_layernorm.weight"] = (hidden,)
            linear(at + "self_attn.q_proj", queries, hidden, biased)
            linear(at + "self_attn.k_proj", keys, hidden, biased)
            linear(at + "self_attn.v_proj", keys, hidden, biased)
            linear(at + "self_attn.o_proj", hidden, queries, biased and not qwen2)
        if not ffn["no_op"]:
            bias = not qwen2 and config["mlp_bias"]
            shapes[at + "post_attention_layernorm.weight"] = (hidden,)
            linear(at + "mlp.gate_proj", ffn["intermediate_size"], hidden, bias)
            linear(at + "mlp.up_proj", ffn["intermediate_size"], hidden, bias)
            linear(at + "mlp.down_proj", hidden, ffn["intermediate_size"], bias)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _block(heads: int, kv_heads: int, width: int, hidden: int) -> dict[str, Any]:
    return {
        "attention": {
            "no_op": not heads,
            "replace_with_linear": False,
            "n_heads_in_group": heads // kv_heads if heads else None,
            "num_attention_heads": heads or None,
            "num_key_value_heads": kv_heads or None,
        },
        "ffn": {
            "no_op": not width,
            "replace_with_linear": False,
            "ffn_mult": 3 * width / (2 * hidden) if width else None,
            "intermediate_size": width or None,
        },
    }


def _number(metadata: Mapping[str, Any], key: str, where: Path) -> int:
    value = metadata.get(f"deci.{key}")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{where}: deci.{key} must be a positive whole number, found {value!r}")
    return value


def _per_layer(metadata: Mapping[str, Any], key: str, layers: int, where: Path) -> list[int]:
    value = metadata.get(f"deci.{key}")
    values = [value] * layers if isinstance(value, int) else value
    if not isinstance(values, list) or len(values) != layers or not all(type(v) is int and v >= 0 for v in values):
        raise CheckpointError(f"{where}: deci.{key} must be a number, or {layers} of them, for the blocks")
    return values
