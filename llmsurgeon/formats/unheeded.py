"""What a config.json asks for and nothing in transformers' model of that type, nor this tool, reads.

Whoever wrote such a key had other code. Some only describe; one that names layers, heads or parts that go makes another
model, which is not to be cut as this one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsurgeon.boundary.foreign import shortened
from llmsurgeon.errors import SurgeryError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Parts of a model, and what is done to them, as words in a key.
PARTS = re.compile(
    r"layers?|blocks?|attn|attns|attention|attentions|mlp|mlps|ffn|ffns|heads?|experts?|ranks?|intermediate",
    re.IGNORECASE,
)
CUTS = re.compile(r"drop|dropped|prune|pruned|pruning|skip|skipped|remove|removed|exit|sparsity|zeroed", re.IGNORECASE)
# Written by tools that publish checkpoints; nothing reads them to compute.
DESCRIBE = re.compile(
    r"_.*|transformers\.js_config|is_llama_config|rope_interleaved|unsloth.*|pretraining_tp|model_max_length|n_ctx|n_positions"
    r"|task_specific_params|summary_\w+|pooler_\w+|directionality|output_past|tie_weights_|model_name|torch_dtype|dtype"
    r"|auto_map|quantization_config|finetuning_task|use_cache|gradient_checkpointing|\w+_version|text_config|vision_config"
    r"|rope_\w+|rotary_\w+|\w*theta|partial_rotary_factor|original_max_position_embeddings|max_position_embeddings"
    r"|\w+_token_id|\w+_token_index|block_configs|block_parents|block_transformer|seq_length|\w*dropout\w*|max_window_layers"
)


def refuse_unheeded(raw: Mapping[str, Any], config: PreTrainedConfig, layers: int | None) -> None:
    """Raise SurgeryError where a key that the class does not know names layers, heads or parts that are to go."""
    for key in unknown(raw, config):
        if names_parts(key, raw[key], layers):
            raise SurgeryError(
                f"config.json: {key} ({shortened(raw[key])}): nothing in transformers' {type(config).__name__} or its "
                "model reads this, and it seems to say that layers or heads work otherwise: without it this would be "
                "another model. Take the key out of config.json if it has no effect; if it has, save the model as a "
                "plain one with the code that it was made for"
            )
    if raw.get("per_layer_config"):
        raise SurgeryError(
            "config.json: per_layer_config gives layers settings of their own, which transformers' "
            f"{type(config).__name__} does not heed and this tool does not read; take it out if it has no effect"
        )


def unheeded(raw: Mapping[str, Any], config: PreTrainedConfig) -> list[str]:
    """What is to be said of a config.json that asks for more than is done."""
    said: list[str] = []
    code = raw.get("auto_map")
    named = [str(value) for key, value in code.items() if "Model" in str(key)] if isinstance(code, Mapping) else []
    if named:
        said.append(
            f"config.json names code of its own for the model ({shortened(', '.join(named))}), which is not run: it is "
            f"read as transformers' own {raw.get('model_type')}, and where that code computes something else, wrongly"
        )
    keys = [key for key in unknown(raw, config) if not DESCRIBE.fullmatch(key)]
    if keys:
        said.append(
            f"config.json has keys that nothing in transformers' {type(config).__name__} or its model reads: "
            f"{shortened(', '.join(keys), 200)}"
        )
    return said


def unknown(raw: Mapping[str, Any], config: PreTrainedConfig) -> list[str]:
    """Keys that are not off, that the config class only takes along, and that no line of the model's source names."""
    taken, kind = config.to_dict(), type(config)
    named = _words(kind.__module__)
    return [
        key
        for key, value in raw.items()
        if key in taken and value not in (None, False, 0, "", [], {}) and key not in named and not hasattr(kind, key)
    ]


@cache
def _words(configuration: str) -> frozenset[str]:
    """Every word in the source of a configuration and of the model beside it."""
    own = Path(str(import_module(configuration).__file__))
    beside = own.with_name(own.name.replace("configuration_", "modeling_"))
    texts = (file.read_text(encoding="utf-8") for file in (own, beside) if file.is_file())
    return frozenset(word for text in texts for word in re.findall(r"\w+", text))


def names_parts(key: str, value: Any, layers: int | None) -> bool:
    """True where a value says something of single layers or heads, or that parts of the model go."""
    words = re.split(r"[_\W]+", key)
    part = any(PARTS.fullmatch(word) for word in words)
    cut = any(CUTS.fullmatch(word) for word in words)
    if isinstance(value, list):
        if key == "layer_types" and set(map(str, value)) <= {"full_attention"}:
            return False
        numbers = all(isinstance(each, int) for each in value)
        return (part or cut) and (numbers or len(value) == layers)
    if isinstance(value, Mapping):
        return (part or cut) and all(str(each).isdecimal() for each in value)
    return part and cut and not isinstance(value, float)
