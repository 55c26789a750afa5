"""nemotron-nas: NVIDIA's description of Llama models whose blocks differ in shape (Puzzle, arXiv 2411.19146).

`block_configs` says of each block how many query heads share a KV head, how wide the FFN is, and what is absent.
vLLM, SGLang, TensorRT-LLM, mlx-lm and llama.cpp's converter read it. Their rules, which `misfit` and `write` keep to:

    width       readers compute ceil256(int(2 * ffn_mult * hidden / 3)), so widths are multiples of 256
    keys        a key they do not know is an error for some: entries hold KEYS and nothing else
    block 0     has attention: readers start the residual stream there
    no-op       an absent part has neither norm nor projections; a block without both is not written
    RoPE        under its old keys and its new one, or the base is lost
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats.form import Body, CheckpointForm, modeling_files
from llmsurgeon.model.families import SURGEON_PREFIX, Family
from llmsurgeon.model.parts import FFNSpec
from llmsurgeon.model.spec import LayerSpec, ModelSpec

MODEL_TYPE = "nemotron-nas"
ARCHITECTURE = "DeciLMForCausalLM"
FAMILIES = ("llama", "mistral", "qwen2")
STEP = 256
CODE = ("configuration_decilm.py", "modeling_decilm.py", "surgeon_versions.py")
LOADS = (
    "It is a DeciLM (Nemotron-NAS) checkpoint: vLLM, SGLang, TensorRT-LLM, mlx-lm and llama.cpp's converter read that "
    "form. For transformers its code ships in the checkpoint: read its .py files, then load with "
    "trust_remote_code=True. vLLM needs no trust_remote_code where llmsurgeon is installed."
)
# More zeros than this share of the FFNs, and `auto` looks elsewhere.
MOST_PADDING = 0.05

ATTENTION_KEYS: dict[str, Any] = {
    "no_op": True,
    "replace_with_linear": False,
    "sparsify": None,
    "n_heads_in_group": None,
    "window_length": None,
    "num_sink_tokens": None,
    "use_prefill_window_in_sink_attention": False,
    "unshifted_sink": False,
}
FFN_KEYS: dict[str, Any] = {"no_op": True, "replace_with_linear": False, "sparsify": None, "ffn_mult": None}


def is_nemotron_nas(config: Mapping[str, Any]) -> bool:
    """True for the config of a checkpoint in this format, ours or another's."""
    return config.get("model_type") == MODEL_TYPE


def padded_width(width: int) -> int:
    """The width that readers give an FFN of `width` channels."""
    return -(-width // STEP) * STEP


def width_of(ffn_mult: float, hidden: int) -> int:
    """The width that readers compute from `ffn_mult`."""
    return padded_width(int(2 * ffn_mult * hidden / 3))


def misfit(spec: ModelSpec, family: Family, config: Mapping[str, Any]) -> str | None:
    """Why the format cannot hold the model, None where it can. `config` is the source's, normalised."""
    if spec.block_transformer:
        return "its readers know one stack of layers, and this is a block transformer"
    if family.model_type not in FAMILIES:
        return f"its readers know Llama-shaped models ({', '.join(FAMILIES)}), not {family.model_type}"
    if config.get("hidden_act") != "silu":
        return f"its readers know the activation silu alone, not {config.get('hidden_act')}"
    if config.get("mlp_bias"):
        return "its readers leave out biases of the FFNs (mlp_bias)"
    heads = config[family.heads_key]
    for index, layer in enumerate(spec.layers):
        if layer.branches:
            return f"block {index} runs {len(layer.branches)} blocks in parallel"
        if layer.empty:
            return f"block {index} has neither attention nor FFN"
        if layer.own_kind:
            return f"block {index} {layer.own_kind}"
        if layer.ffn and layer.ffn.kind != FFNSpec.kind:
            return f"block {index} has an FFN that is not dense"
        attention = layer.attention
        if attention is None:
            if index == 0:
                return "block 0 has no attention, and its readers start the residual stream there"
            continue
        if attention.window is not None:
            return f"block {index} has a sliding window"
        if attention.heads != heads or attention.heads * attention.head_dim != spec.hidden:
            return (
                f"block {index} has {attention.heads} heads of width {attention.head_dim}; its readers take "
                f"hidden size / heads ({spec.hidden} / {heads})"
            )
    return None


def waste(spec: ModelSpec) -> str | None:
    """Why `auto` would rather not pad: the zeros would outweigh what other engines are worth. None where it may."""
    widths = [layer.ffn.width for layer in spec.layers if layer.ffn]
    share = sum(map(padded_width, widths)) / max(1, sum(widths)) - 1
    if share <= MOST_PADDING:
        return None
    zeros = f"{100 * share:.0f} % of zeros"
    return f"padding its widths to multiples of {STEP} would add {zeros} (asked for, it is written all the same)"


def caveats(spec: ModelSpec, config: Mapping[str, Any]) -> list[str]:
    """What a reader would get wrong or refuse of this model, a sentence each."""
    made = []
    if config["attention_bias"]:
        made.append("TensorRT-LLM leaves out attention biases and would answer wrongly: do not serve it there.")
    if len({a.kv_heads for a in spec.attentions}) > 1:
        made.append("SGLang refuses it, since its numbers of KV heads differ.")
    lone = [index for index, layer in enumerate(spec.layers) if layer.ffn is None]
    if lone:
        made.append(f"llama.cpp would drop the attention of block {lone[0]}, which has no FFN: make no GGUF of it.")
    return made


def padded_spec(spec: ModelSpec) -> ModelSpec:
    """The spec with the widths that readers see."""
    return spec.with_layers(
        [replace(layer, ffn=layer.ffn and FFNSpec(padded_width(layer.ffn.width))) for layer in spec.layers]
    )


def config_of(spec: ModelSpec, family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the (padded) spec, made from the cut source's, which has its RoPE under old keys and new ones."""
    dropped = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
    kept = {key: value for key, value in config.items() if key not in dropped}
    return {
        **kept,
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "auto_map": {
            "AutoConfig": "configuration_decilm.DeciLMConfig",
            "AutoModel": "modeling_decilm.DeciLMModel",
            "AutoModelForCausalLM": f"modeling_decilm.{ARCHITECTURE}",
            "AutoModelForSequenceClassification": "modeling_decilm.DeciLMForSequenceClassification",
            "AutoModelForTokenClassification": "modeling_decilm.DeciLMForTokenClassification",
        },
        "block_configs": [_entry(layer, spec.hidden) for layer in spec.layers],
        # Ours, and outside the entries: which layers of the parent each block does the work of.
        "block_parents": [list(layer.parents) for layer in spec.layers],
        # These two differ from block to block. NVIDIA's own checkpoints have null; a stock LlamaConfig refuses it.
        "intermediate_size": None,
        "num_key_value_heads": None,
        "head_dim": spec.hidden // config[family.heads_key],
        # Qwen2 has biases on q, k and v and none on o; readers have one switch for all four.
        "attention_bias": bool(config.get("attention_bias")) or family.biased_qkv,
        "mlp_bias": False,
        "tie_word_embeddings": spec.tied,
    }


def _entry(layer: LayerSpec, hidden: int) -> dict[str, Any]:
    attention, ffn = dict(ATTENTION_KEYS), dict(FFN_KEYS)
    if layer.attention:
        attention |= {"no_op": False, "n_heads_in_group": layer.attention.heads // layer.attention.kv_heads}
    if layer.ffn:
        ffn |= {"no_op": False, "ffn_mult": 3 * layer.ffn.width / (2 * hidden)}
    return {"attention": attention, "ffn": ffn}


def read(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the same model as Llama in the surgeon format, which the rest of the tool works with.

    Raises:
        SurgeryError: an entry says something that this tool has no blocks for.
    """
    entries = config.get("block_configs")
    if not isinstance(entries, list) or not entries:
        raise SurgeryError(f"config.json: a {MODEL_TYPE} model needs block_configs, one entry per layer")
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        blocks = [_read_entry(entry, index, heads, hidden) for index, entry in enumerate(entries)]
    except (KeyError, TypeError, ZeroDivisionError) as error:
        message = f"config.json: block_configs of a {MODEL_TYPE} model cannot be read: {type(error).__name__} {error}"
        raise SurgeryError(message) from error
    kv_heads = [b["attention"]["num_key_value_heads"] for b in blocks if not b["attention"]["no_op"]]
    widths = [b["ffn"]["intermediate_size"] for b in blocks if not b["ffn"]["no_op"]]
    parents = config.get("block_parents")
    if isinstance(parents, list) and len(parents) == len(blocks):
        blocks = [{**layer, "parents": layers} for layer, layers in zip(blocks, parents, strict=True)]
    dropped = ("auto_map", "architectures", "block_parents", "torch_dtype", "rope_theta", "rope_scaling")
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    return {
        **{key: value for key, value in config.items() if key not in dropped},
        "model_type": SURGEON_PREFIX + "llama",
        "dtype": config.get("dtype") or config.get("torch_dtype"),
        "rope_parameters": {"rope_theta": config.get("rope_theta", 10000.0), **rope},
        "block_configs": blocks,
        "num_key_value_heads": max(kv_heads, default=heads),
        "intermediate_size": max(widths, default=STEP),
    }


def _read_entry(entry: Mapping[str, Any], index: int, heads: int, hidden: int) -> dict[str, Any]:
    attention, ffn = entry["attention"], entry["ffn"]
    for part, known in ((attention, ATTENTION_KEYS), (ffn, FFN_KEYS)):
        for key, value in part.items():
            free = key in ("no_op", "n_heads_in_group", "ffn_mult", "intermediate_size")
            if value and not free and not (key == "hidden_act" and value == "silu"):
                known_as = "is known and not supported" if key in known else "is not known"
                raise SurgeryError(f"config.json: block_configs[{index}] has {key}: {value!r}, which {known_as} here")
    width = None
    if not ffn["no_op"]:
        given = ffn.get("intermediate_size")
        width = given if given and ffn.get("ffn_mult") is None else width_of(ffn["ffn_mult"], hidden)
    kv_heads = None if attention["no_op"] else heads // attention["n_heads_in_group"]
    return {
        "attention": {
            "no_op": bool(attention["no_op"]),
            "num_attention_heads": None if kv_heads is None else heads,
            "num_key_value_heads": kv_heads,
        },
        "ffn": {"no_op": bool(ffn["no_op"]), "intermediate_size": width},
    }


def describe(spec: ModelSpec, family: Family, config: Mapping[str, Any]) -> Body:
    """The model in this form; `config` is the (cut) source's."""
    shaped = padded_spec(spec)
    made = config_of(shaped, family, config)
    return Body(made, shaped, " ".join([LOADS, *caveats(spec, made)]), modeling_files(CODE))


def _limit(family: Family) -> tuple[str, bool] | None:
    return None if family.model_type in FAMILIES else ("its readers know Llama-shaped models alone", True)


NEMOTRON_NAS = CheckpointForm(
    name="nemotron-nas",
    misfit=misfit,
    unwanted=lambda spec, family, config: misfit(spec, family, config) or waste(spec),
    describe=describe,
    limit=_limit,
    recognises=is_nemotron_nas,
    read=read,
    ships_code=True,
)
