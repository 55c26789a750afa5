"""config.json and generation_config.json."""

from __future__ import annotations

from random import Random

from tests.attack.commands import command
from tests.attack.ground import pick
from tests.attack.mutations import mutated_json
from tests.attack.scene import Scene, Verdict

MODELS = (
    "llama",
    "qwen3",
    "gpt2",
    "gemma3",
    "mixtral",
    "bert",
    "fused",
    "surgeon",
    "nas",
    "mlgru",
    "block",
    "fff",
    "ternary",
)
KEYS = (
    "model_type", "architectures", "auto_map", "torch_dtype", "dtype", "quantization_config", "text_config",
    "block_configs",
    "layer_types", "rope_scaling", "rope_parameters", "rope_theta", "head_dim", "hidden_act", "sliding_window",
    "pad_token_id",
    "tie_word_embeddings", "num_hidden_layers", "num_labels", "id2label", "is_encoder_decoder", "num_local_experts",
    "per_layer_config", "attention_bias", "partial_rotary_factor", "_attn_implementation", "surgeon", "", "n" * 300,
    "\ud800",
)  # fmt: skip
ROPE = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "nonsense", "")


def attempt(draw: Random, scene: Scene) -> Verdict:
    name = pick(draw, *MODELS)
    folder = scene.copy(name, "model")
    file = folder / "config.json"
    if (folder / "generation_config.json").exists() and draw.random() < 0.15:
        file = folder / "generation_config.json"
    content, what = mutated_json(draw, file.read_bytes(), KEYS, deep=draw.random() < 0.4)
    file.write_bytes(content)
    return scene.check(command(draw, scene, "model", parent_of(name)), f"{name}/{file.name}: {what}")


def parent_of(name: str) -> str:
    """A healthy model that `name` may be healed from or compared with."""
    return {"surgeon": "qwen3"}.get(name, name if name in ("qwen3", "gpt2", "gemma3", "mixtral", "bert") else "llama")
