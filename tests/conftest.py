"""Tiny models of every family, built in seconds, with weights large enough that every part matters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

LAYERS = 6
TINY: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 96},
    "mistral": {"num_key_value_heads": 2, "intermediate_size": 96, "sliding_window": 8},
    "qwen2": {
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 3,
    },
    "qwen3": {"num_key_value_heads": 2, "intermediate_size": 96, "head_dim": 16},
    "gpt2": {},
    "gpt_neox": {"intermediate_size": 96},
}
FAMILY_NAMES = tuple(TINY)


def tiny_config(family: str, **changes: Any) -> dict[str, Any]:
    """config.json of a tiny model: 6 layers, 32 wide, 4 heads, 64 tokens in the vocabulary."""
    from transformers import AutoConfig

    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(family, **{**sizes, **TINY[family], **changes})
    return {**config.to_dict(), "model_type": family}


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model whose norms, biases and projections all matter to its output."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = tiny_config(family, **changes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if "norm" in name or ("ln_" in name and name.endswith("weight")) else noise)
            if parameter.dim() > 1:
                parameter.mul_(0.6 / parameter.shape[-1] ** 0.5)
    return model.to(dtype).eval()


def save_tiny(folder: Path, family: str, tokenizer: bool = False, **changes: Any) -> Path:
    """A tiny checkpoint on disk, as transformers writes it."""
    model = tiny_model(family, **changes)
    model.save_pretrained(folder)
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == family
    return folder


def byte_tokenizer() -> Any:
    """A tokenizer of 64 tokens that needs no download: letters and a few signs."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    signs = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123.,; \n"]
    tokenizer = Tokenizer(models.WordLevel({sign: i for i, sign in enumerate(signs[:64])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=128
    )


@pytest.fixture(params=FAMILY_NAMES)
def family_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Path]:
    """tiny("llama") -> folder of a fresh tiny checkpoint."""

    def make(family: str = "llama", name: str = "parent", **changes: Any) -> Path:
        return save_tiny(tmp_path / name, family, **changes)

    return make
