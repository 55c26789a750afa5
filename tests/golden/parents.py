"""The tiny models that the cases are run on, and the text that they are measured on."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from tests.golden.cases import (
    GGUF,
    GGUF_FAMILIES,
    HEADS,
    SHAPES,
    VISION,
    Case,
    chosen,
    command,
    of_recipe,
    written,
)

ROOT = Path(__file__).resolve().parents[2]
# One of each kind, on which all cases are run; the others take those that tell families apart.
THOROUGH = ("llama", "qwen3", "gpt2", "mixtral", "bert")
TEXT_TOWER: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
}
QWEN_TOWER = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
}
# What differs from TEXT_TOWER.
TEXT_TOWERS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "qwen2_vl": {"model_type": "qwen2_vl_text", **QWEN_TOWER},
    "qwen2_5_vl": {"model_type": "qwen2_5_vl_text", **QWEN_TOWER},
}
SMALL_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
IMAGE = 5
VISION_TOWERS: dict[str, dict[str, Any]] = {
    "llava": {
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": 16, **SMALL_VISION},
        "image_token_index": IMAGE,
        "image_seq_length": 4,
    },
    "idefics3": {"vision_config": SMALL_VISION, "image_token_id": IMAGE, "scale_factor": 2},
    "smolvlm": {"vision_config": SMALL_VISION, "image_token_id": IMAGE, "scale_factor": 2},
    "gemma3": {
        "vision_config": {"model_type": "siglip_vision_model", **SMALL_VISION},
        "image_token_index": IMAGE,
        "mm_tokens_per_image": 1,
    },
    "qwen2_vl": {
        "vision_config": {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4},
        "image_token_id": IMAGE,
    },
    "qwen2_5_vl": {
        "vision_config": {
            "depth": 2,
            "hidden_size": 16,
            "out_hidden_size": 32,
            "num_heads": 2,
            "patch_size": 4,
            "intermediate_size": 32,
            "window_size": 16,
        },
        "image_token_id": IMAGE,
    },
}


@dataclass(frozen=True)
class Unit:
    """What is written down in one folder: how its models come to be in the working folder, and the cases."""

    prepare: Callable[[Path], None]
    cases: tuple[Case, ...]


def units() -> dict[str, Unit]:
    """Every unit by its name, which is the family's for most."""
    from conftest import ENCODER_NAMES, FAMILY_NAMES, MIXTURE_NAMES, masked_head, save_encoder, save_tiny

    found: dict[str, Unit] = {}
    for family in (*FAMILY_NAMES, *MIXTURE_NAMES):
        found[family] = Unit(_decoder(save_tiny, family), chosen(family in THOROUGH))
    for family in ENCODER_NAMES:
        head = masked_head(family)
        found[family] = Unit(_encoder(save_encoder, family, head), chosen(family in THOROUGH))
    for name, (family, changes) in variants().items():
        found[name] = Unit(_decoder(save_tiny, family, **changes), chosen(False, brief=True))
    for name in VISION_TOWERS:
        found[name] = Unit(_vision(name), VISION)
    more = tuple(command(f"export-{name}", f"export {name} --to gguf -o {name}.gguf") for name in GGUF_FAMILIES)
    found["gguf"] = Unit(_gguf, tuple(written(case) for case in (*GGUF, *more)))
    names = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    found["recipes"] = Unit(
        _configs, (command("ls", "recipes ls"), *(case for name in names for case in of_recipe(name)))
    )
    return found


def variants() -> dict[str, tuple[str, dict[str, Any]]]:
    """Layouts of a family whose maths differs: name -> (family, changes of its tiny config)."""
    return {
        "llama-biased": ("llama", {"mlp_bias": True, "attention_bias": True, "tie_word_embeddings": True}),
        "mistral-unwindowed": ("mistral", {"sliding_window": None}),
        "qwen2-unwindowed": ("qwen2", {"use_sliding_window": False}),
        "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
        "stablelm-parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
        "falcon-7b": ("falcon", {"new_decoder_architecture": False, "num_kv_heads": None, "bias": False}),
        "opt-350m": ("opt", {"do_layer_norm_before": False}),
    }


def text() -> str:
    """Sentences of letters drawn at random: the same every time, and none like another."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 7))) for _ in range(120)]
    return "".join(" ".join(draw.choices(words, k=draw.randint(4, 9))) + ".\n" for _ in range(60))


def save_tokenizer(folder: Path, framed: bool = False) -> None:
    """Put a tokenizer whose vocabulary can be trimmed beside a model: BPE of 64 tokens, half of them pairs of signs.

    framed: with [CLS], [SEP] and [MASK], as encoders read a text.
    """
    from tokenizers import Tokenizer, models, processors
    from transformers import PreTrainedTokenizerFast

    signs = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz.\n "]
    counted = Counter(pair for pair in pairwise(text()) if all(sign.isalpha() for sign in pair))
    merges = [pair for pair, _ in sorted(counted.items(), key=lambda item: (-item[1], item[0]))][: 64 - len(signs)]
    vocabulary = {token: place for place, token in enumerate([*signs, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    if framed:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
        names = {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "\n"}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", model_max_length=64, **names)
    made.save_pretrained(folder)


def _decoder(save: Callable[..., Path], family: str, **changes: Any) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        save(folder / "parent", family, **changes)
        save_tokenizer(folder / "parent")

    return prepare


def _encoder(save: Callable[..., Path], family: str, head: str) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        save(folder / "parent", family, head)
        save_tokenizer(folder / "parent", framed=True)

    return prepare


def _vision(name: str) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        vision_model(name).save_pretrained(folder / "parent")
        save_tokenizer(folder / "parent")
        (folder / "parent" / "preprocessor_config.json").write_text("{}")

    return prepare


def vision_model(name: str) -> Any:
    """A random vision-language model of four text layers, in transformers' own class."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.for_model(name, text_config={**TEXT_TOWER, **TEXT_TOWERS.get(name, {})}, **VISION_TOWERS[name])
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def _gguf(folder: Path) -> None:
    from gguf_models import save_uniform

    save_uniform(folder / "parent", "llama")
    save_uniform(folder / "wide", "llama", hidden_size=256, intermediate_size=256, num_hidden_layers=2)
    for family in GGUF_FAMILIES:
        save_uniform(folder / family, family, num_hidden_layers=2)


def _configs(folder: Path) -> None:
    from transformers import AutoConfig

    for name, (family, sizes) in SHAPES.items():
        heads, groups = HEADS[int(sizes["hidden_size"])]
        more = {"num_key_value_heads": groups} if family == "llama" else {}
        config = AutoConfig.for_model(family, num_attention_heads=heads, **sizes, **more)
        config.architectures = ["LlamaForCausalLM" if family == "llama" else "BertForMaskedLM"]
        (folder / f"{name}.json").write_text(json.dumps({**config.to_dict(), "model_type": family}))
