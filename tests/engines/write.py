"""Checkpoints for engines to load, and what transformers makes of them: python tests/engines/write.py FOLDER [MODEL]

expected.json: name of the checkpoint -> its prompts as tokens, the log-probability of each of their tokens but the
first in float32, how far from that transformers itself is in bfloat16, and the tokens that follow greedily.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from conftest import save_tiny
from gguf_models import byte_level_tokenizer

from llmsurgeon.formats.loading import load_model, load_tokenizer
from llmsurgeon.run import Options, run

PROMPTS, FEWEST, MOST, NEW = 20, 5, 40, 12
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
    "  - {op: prune_width, width: 200, layers: [5], score: magnitude}\n  - {op: fuse_ffn, runs: [2-3]}\n"
)
PARALLEL = "version: 1\nformat: surgeon\nsteps: [{op: parallel_blocks, windows: ['2-3']}]\n"
TRIMMED = "version: 1\nformat: native\nsteps: [{op: trim_vocab, rows: 288}]\n"
# A name, the family of its parent, settings of that, what is done.
TINY: dict[str, tuple[str, dict[str, Any], str]] = {
    "nas-llama": ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}, UNEVEN),
    "nas-mistral": ("mistral", {"num_key_value_heads": 2, "sliding_window": None}, UNEVEN),
    "nas-qwen2": ("qwen2", {"num_key_value_heads": 4, "use_sliding_window": False}, UNEVEN),
    "surgeon-llama": ("llama", {"num_key_value_heads": 2}, SURGEON),
    "refused-parallel": ("llama", {"num_key_value_heads": 2}, PARALLEL),
    "native-trimmed": ("llama", {"num_key_value_heads": 2, "vocab_size": 320}, TRIMMED),
}


def write(base: Path, model: str | None) -> None:
    """All checkpoints, and expected.json."""
    expected = {}
    for name, (family, settings, recipe) in TINY.items():
        parent = save_tiny(base / f"parent-{name}", family, tokenizer=True, **{**SIZES, **settings})
        if recipe == TRIMMED:  # what is trimmed is a BPE's
            byte_level_tokenizer().save_pretrained(parent)
        expected[name] = made(base, name, str(parent), recipe, torch.float32)
    if model:
        expected["nas-real"] = made(base, "nas-real", model, FUSED, torch.bfloat16)
    (base / "expected.json").write_text(json.dumps(expected))


def made(base: Path, name: str, parent: str, recipe: str, dtype: torch.dtype) -> dict[str, Any]:
    """A checkpoint, and what transformers makes of it."""
    path = base / f"{name}.yaml"
    path.write_text(recipe)
    run(path, parent, base / name, Options())
    exact, rounded = (load_model(str(base / name), dtype=kind) for kind in (torch.float32, torch.bfloat16))
    prompts = _prompts(str(base / name), exact.config.vocab_size, real=dtype == torch.bfloat16)
    logs, off, follow = [], [], []
    for prompt in prompts:
        logs.append(_logs(exact, prompt))
        off += [abs(a - b) for a, b in zip(logs[-1], _logs(rounded, prompt), strict=True)]
        follow.append(_follow(exact if dtype == torch.float32 else rounded, prompt))
    return {
        "prompts": prompts,
        "logs": logs,
        "bfloat16": sum(off) / len(off),
        "follow": follow,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _prompts(folder: str, vocab: int, real: bool) -> list[list[int]]:
    """Lists of tokens of differing length: random ones for tiny models, of a text for a real one."""
    if real:
        text = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text()
        ids = load_tokenizer(folder)(text)["input_ids"]
        return [ids[i * 37 : i * 37 + FEWEST + i * 2] for i in range(PROMPTS)]
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
    while len(made) < NEW:
        logits = model(input_ids=torch.tensor([[*prompt, *made]]), use_cache=False).logits[0, -1]
        made.append(int(logits.argmax()))
    return made


if __name__ == "__main__":
    write(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
