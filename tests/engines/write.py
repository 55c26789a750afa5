"""Checkpoints for engines to load, and what transformers makes of them: python tests/engines/write.py FOLDER

expected.json: name of the checkpoint -> its folder, its prompts as tokens (and of real checkpoints as text), the
log-probability of each of their tokens but the first in float32, how far from that transformers itself is in bfloat16,
and the tokens that follow greedily.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from conftest import save_encoder, save_tiny
from gguf_models import byte_level_tokenizer

from llmsurgeon.export import export
from llmsurgeon.formats.caches import cached_call
from llmsurgeon.formats.loading import load_model, load_tokenizer
from llmsurgeon.run import Options, run

PROMPTS, TEXTS, FEWEST, MOST, NEW = 20, 8, 5, 40, 12
VOCAB = 64
# Heads of 32 and rows of whole tiles: what engines' kernels take. Weights as far apart as those of a trained model.
SIZES = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 256, "max_position_embeddings": 256}
STEPS = "version: 1\nformat: nemotron-nas\nsteps:\n"
UNEVEN = (
    STEPS + "  - {op: prune_attention, layers: [2, 3]}\n  - {op: prune_ffn, layers: [1]}\n"
    "  - {op: prune_width, width: 200, layers: [5], score: magnitude}\n  - {op: fuse_ffn, runs: [2-3]}\n"
)
FUSED = STEPS + "  - {op: prune_attention, layers: [4, 5, 11, 12]}\n  - {op: fuse_ffn, runs: [4-5, 11-12]}\n"
SURGEON = (
    "version: 1\nformat: surgeon\nsteps:\n  - {op: prune_attention, layers: [0, 3]}\n  - {op: prune_ffn, layers: [1]}\n"
)
NARROWER = "  - {op: prune_width, width: 200, layers: [5], score: magnitude}\n"
FUSED_PAIR = "  - {op: fuse_ffn, runs: [2-3]}\n"
FEWER_KV = "  - {op: prune_kv_heads, kv_heads: 1, layers: [4]}\n"
ALL_SHAPES = SURGEON + NARROWER + FUSED_PAIR + FEWER_KV
FEWER_HEADS = "version: 1\nformat: surgeon\nsteps: [{op: prune_heads, heads: 2, layers: [1], score: magnitude}]\n"
PARALLEL = "version: 1\nformat: surgeon\nsteps: [{op: parallel_blocks, windows: ['2-3']}]\n"
NARROW = (
    "version: 1\nformat: native\nsteps:\n  - {op: prune_blocks, layers: [2]}\n"
    "  - {op: prune_width, width: 192, score: magnitude}\n"
)
TRIMMED = "version: 1\nformat: native\nsteps: [{op: trim_vocab, rows: 288}]\n"
WIDE_HEADS = {"head_dim": 32, "query_pre_attn_scalar": 32}
# A name, the family of its parent, settings of that, what is done.
TINY: dict[str, tuple[str, dict[str, Any], str]] = {
    "nas-llama": ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}, UNEVEN),
    "nas-mistral": ("mistral", {"num_key_value_heads": 2, "sliding_window": None}, UNEVEN),
    "nas-qwen2": ("qwen2", {"num_key_value_heads": 4, "use_sliding_window": False}, UNEVEN),
    "surgeon-llama": ("llama", {"num_key_value_heads": 2}, ALL_SHAPES),
    "surgeon-mistral": ("mistral", {"num_key_value_heads": 2}, ALL_SHAPES),
    "surgeon-qwen2": ("qwen2", {"use_sliding_window": False}, ALL_SHAPES),
    "surgeon-qwen3": ("qwen3", {"head_dim": 32}, ALL_SHAPES),
    "surgeon-phi3": ("phi3", {}, ALL_SHAPES),
    "surgeon-granite": ("granite", {}, ALL_SHAPES),
    "surgeon-gemma2": ("gemma2", WIDE_HEADS, SURGEON + NARROWER + FEWER_KV),
    "surgeon-gemma3_text": ("gemma3_text", WIDE_HEADS, SURGEON + NARROWER),
    "surgeon-gpt2": ("gpt2", {"n_inner": 256}, SURGEON + NARROWER + FUSED_PAIR),
    "surgeon-bloom": ("bloom", {}, SURGEON + NARROWER + FUSED_PAIR),
    "surgeon-opt": ("opt", {"ffn_dim": 256, "word_embed_proj_dim": 128}, SURGEON + NARROWER),
    "surgeon-falcon": ("falcon", {"ffn_hidden_size": 512}, SURGEON + NARROWER),
    "surgeon-stablelm": ("stablelm", {"use_parallel_residual": False, "qk_layernorm": False}, SURGEON + NARROWER),
    "surgeon-mixtral": ("mixtral", {"sliding_window": None}, SURGEON),
    "surgeon-qwen3_moe": ("qwen3_moe", {"head_dim": 32, "moe_intermediate_size": 64}, SURGEON),
    "refused-parallel": ("llama", {"num_key_value_heads": 2}, PARALLEL),
    "refused-settings": ("stablelm", {"use_parallel_residual": True}, SURGEON),
    "refused-heads": ("qwen2", {"use_sliding_window": False}, FEWER_HEADS),
    "native-llama": ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}, NARROW),
    "native-qwen2": ("qwen2", {"num_key_value_heads": 4, "use_sliding_window": False}, NARROW),
    "native-trimmed": ("llama", {"num_key_value_heads": 2, "vocab_size": 320}, TRIMMED),
}


def write(base: Path, model: str | None, checkpoints: list[Path]) -> None:
    """All checkpoints but those that are there, and expected.json."""
    expected = {}
    for name, (family, settings, recipe) in TINY.items():
        parent = save_tiny(base / f"parent-{name}", family, tokenizer=True, **{**SIZES, **settings})
        if recipe == TRIMMED:  # what is trimmed is a BPE's
            byte_level_tokenizer().save_pretrained(parent)
        expected[name] = computed(made(base, name, str(parent), recipe), torch.float32)
    encoder = {**SIZES, "num_attention_heads": 4, "vocab_size": VOCAB}
    save_encoder(base / "encoder-bert", "bert", **encoder)
    expected["bitnet-llama"] = computed(packed(base), torch.float32, AutoModelForCausalLM.from_pretrained, rounds=False)
    if model:
        export(model, base / "native-real", "native")
        expected["native-real"] = computed(base / "native-real", torch.bfloat16)
        expected["nas-real"] = computed(made(base, "nas-real", model, FUSED), torch.bfloat16)
    for folder in checkpoints:
        expected[folder.name] = computed(folder.resolve(), torch.bfloat16)
    (base / "expected.json").write_text(json.dumps(expected))


def made(base: Path, name: str, parent: str, recipe: str) -> Path:
    """A recipe's checkpoint."""
    path = base / f"{name}.yaml"
    path.write_text(recipe)
    run(path, parent, base / name, Options())
    return base / name


def packed(base: Path) -> Path:
    """A checkpoint whose linears are ternary, each with a scale of its own, and packed."""
    parent = save_tiny(base / "parent-bitnet-llama", "llama", tokenizer=True, **{**SIZES, "num_key_value_heads": 2})
    file = parent / "model.safetensors"
    tensors = load_file(file)
    for number, (name, weight) in enumerate(tensors.items()):
        if weight.dim() == 2 and ".layers." in name:
            ternary = torch.where(weight.abs() > weight.abs().mean(), weight.sign(), 0.0)
            tensors[name] = ternary * (0.02 + 0.001 * number)
    save_file(tensors, file, metadata={"format": "pt"})
    export(parent, base / "bitnet-llama", "bitnet")
    # vLLM has queries, keys and values in one linear: of these one would be plain.
    shutil.copytree(base / "bitnet-llama", base / "refused-mixed")
    config = json.loads((base / "refused-mixed" / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"].append("model.layers.2.self_attn.q_proj")
    (base / "refused-mixed" / "config.json").write_text(json.dumps(config))
    return base / "bitnet-llama"


def computed(
    folder: Path, dtype: torch.dtype, load: Callable[..., Any] = load_model, rounds: bool = True
) -> dict[str, Any]:
    """What transformers makes of a checkpoint; in bfloat16 it is a real one, read as text.

    rounds: whether transformers computes in bfloat16 what is stored in float32, which it does not of packed linears.
    """
    exact = load(str(folder), dtype=torch.float32)
    rounded = load(str(folder), dtype=torch.bfloat16) if rounds else None
    texts = _texts() if dtype == torch.bfloat16 else None
    prompts = _drawn(exact.config.vocab_size) if texts is None else load_tokenizer(str(folder))(texts)["input_ids"]
    logs, off, follow = [], [], []
    for prompt in prompts:
        logs.append(_logs(exact, prompt))
        if rounded:
            off += [abs(a - b) for a, b in zip(logs[-1], _logs(rounded, prompt), strict=True)]
        follow.append(_follow(rounded if rounded and dtype == torch.bfloat16 else exact, prompt))
    return {
        "folder": str(folder),
        "texts": texts,
        "prompts": prompts,
        "logs": logs,
        "bfloat16": sum(off) / len(off) if off else None,
        "follow": follow,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _texts() -> list[str]:
    """Pieces of a text, of differing length."""
    text = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text()
    return [text[i * 400 : i * 400 + (i + 1) * FEWEST * 4] for i in range(TEXTS)]


def _drawn(vocab: int) -> list[list[int]]:
    """Random tokens, lists of differing length."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(FEWEST, MOST, (PROMPTS,), generator=draw).tolist()
    return [torch.randint(3, min(vocab, VOCAB), (length,), generator=draw).tolist() for length in lengths]


@torch.no_grad()
def _logs(model: Any, prompt: list[int]) -> list[float]:
    """The log-probability of each token but the first."""
    logits = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, :-1].float()
    logs: list[float] = logits.log_softmax(-1).gather(-1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()
    return logs


@torch.no_grad()
def _follow(model: Any, prompt: list[int]) -> list[int]:
    """The tokens that follow greedily, whatever ends a text."""
    made: list[int] = []
    cache, seen = None, prompt
    while len(made) < NEW:
        output, cache = cached_call(model, cache, input_ids=torch.tensor([seen]))
        made.append(int(output.logits[0, -1].argmax()))
        seen = made[-1:]
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--checkpoint", type=Path, nargs="*", default=[])
    arguments = parser.parse_args()
    write(arguments.base, arguments.model, arguments.checkpoint)
