"""Checkpoints of every form and family, to be loaded where this package is not.

python tests/formats/forms.py FOLDER [NAMES]      writes them and expected.json: name -> its logits in this environment
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from conftest import ENCODER_NAMES, FAMILY_NAMES, MIXTURE_NAMES, masked_head, save_encoder, save_tiny
from operations.helpers import FALCON_7B, FALCON_RW, declared, logits

from llmsurgeon.formats.loading import load_model
from llmsurgeon.operations.block import Block
from llmsurgeon.operations.fuse_ffn import FuseFFN
from llmsurgeon.operations.matmulfree import MatMulFree
from llmsurgeon.operations.parallel_blocks import ParallelBlocks
from llmsurgeon.operations.prune_attention import PruneAttention
from llmsurgeon.operations.prune_ffn import PruneFFN
from llmsurgeon.operations.prune_width import PruneWidth
from llmsurgeon.recipe.recipe import Recipe, loads
from llmsurgeon.run import Options, run

TOKENS = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(1))
# Every kind of block: no attention in the first, no FFN, fused, narrow, two in parallel. Four attentions stay.
STEPS = (
    PruneAttention(layers=(0, 3)),
    PruneFFN(layers=(1,)),
    PruneWidth(width=40, layers=(5,), score="magnitude"),
    FuseFFN(runs=((2, 3),)),
    ParallelBlocks(windows=((4, 5),)),
)
SURGEON = {
    **{name: (name, {}) for name in FAMILY_NAMES},
    "llama-biases-tied": ("llama", {"mlp_bias": True, "attention_bias": True, "tie_word_embeddings": True}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "falcon-7b": ("falcon", FALCON_7B),
    "falcon-alibi": ("falcon", FALCON_RW),
    "opt-350m": ("opt", {"do_layer_norm_before": False}),
    "qwen3-sliding": ("qwen3", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 3}),
}
# nemotron-nas wants attention in the first block and nothing in parallel. Four attentions stay here, too.
NAS_STEPS = """
  - {op: prune_attention, layers: [2, 3]}
  - {op: prune_ffn, layers: [1]}
  - {op: prune_width, width: 200, layers: [5], score: magnitude}
  - {op: fuse_ffn, runs: [2-3]}
"""
NAS = {
    "nas-llama": ("llama", {"intermediate_size": 256, "tie_word_embeddings": True}),
    "nas-qwen2": ("qwen2", {"intermediate_size": 256, "use_sliding_window": False}),
}
# Recurrent mixers: beside attentions, alone, beside blocks without any, and with ternary linears, whose rounding shows
# differences of the order of summation.
MIXERS = {
    "mlgru-hybrid": ("llama", {"tie_word_embeddings": True}, (MatMulFree(layers=(0, 3)),)),
    "mlgru-alone": ("qwen2", {}, (MatMulFree(),)),
    "mlgru-windows": ("mistral", {}, (PruneAttention(layers=(1,)), MatMulFree(layers=(2, 5)))),
    "mlgru-ternary": ("qwen3", {}, (MatMulFree(layers=(2,), linears="ternary"),)),
}
# Block transformers: name -> (family, changes, the step).
BLOCK = {
    "block-llama": ("llama", {"tie_word_embeddings": True}, Block(block_length=4)),
    "block-mistral": ("mistral", {"sliding_window": None}, Block(block_length=2, decoder="summation")),
    "block-qwen2": ("qwen2", {"use_sliding_window": False}, Block(block_length=2, embedder="concat", split=2)),
    "block-qwen3": ("qwen3", {}, Block(block_length=4, decoder="cross_attention", prefix_length=1)),
}
# Rotary positions that no default gives: a reader that overlooks a key computes something else. Heads are 8 or 16 wide.
THETA = 321.0
FLAT = {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}}
PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": THETA, "partial_rotary_factor": 0.5}}
LLAMA3 = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": THETA,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
}
YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": THETA,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    }
}
LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": THETA, "factor": 3.0}}
PARTIAL_LINEAR = {"rope_parameters": {**LINEAR["rope_parameters"], "partial_rotary_factor": 0.5}}
LONGROPE = {
    "original_max_position_embeddings": 8,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": THETA,
        "partial_rotary_factor": 1.0,
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [1.5, 2.5, 4.0, 5.0],
        "original_max_position_embeddings": 8,
    },
}
TWO_BASES = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": THETA},
        "sliding_attention": {"rope_type": "default", "rope_theta": 77.0},
    }
}
TWO_PLAIN_BASES = {
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": THETA},
        "sliding_attention": {"rope_type": "default", "rope_theta": 77.0},
    }
}
# Layers 0, 3 and, once 1 and 4 are gone, 0 and 2.
REGULAR = ["full_attention", "sliding_attention", "sliding_attention"] * 2
ROPE: dict[str, dict[str, dict[str, Any]]] = {
    **{f: {"": FLAT} for f in ("mistral", "olmo2", "granite", "gemma2", "smollm3", "falcon", "mixtral", "qwen3_moe")},
    "llama": {"": FLAT, "-llama3": LLAMA3, "-linear": LINEAR, "-yarn": YARN},
    "qwen2": {"": FLAT, "-yarn": YARN},
    "qwen3": {"": FLAT, "-yarn": YARN},
    "gpt_neox": {
        "": PARTIAL,
        "-linear": {"rope_parameters": {**LINEAR["rope_parameters"], "partial_rotary_factor": 0.5}},
    },
    "stablelm": {"": PARTIAL},
    "phi3": {"": PARTIAL, "-longrope": LONGROPE},
    "gemma3_text": {"": TWO_BASES},
    "modernbert": {"": TWO_PLAIN_BASES, "-regular": {**TWO_PLAIN_BASES, "layer_types": REGULAR}},
}


@dataclass(frozen=True)
class Form:
    """One checkpoint: its parent's family and settings, and the recipe."""

    family: str
    recipe: Recipe
    changes: dict[str, Any] = field(default_factory=dict)

    def write(self, out: Path) -> Path:
        """The checkpoint in `out`, its parent beside it."""
        parent = out.with_name(f"parent-{out.name}")
        if self.family in ENCODER_NAMES:
            save_encoder(parent, self.family, masked_head(self.family), **self.changes)
        else:
            save_tiny(parent, self.family, **self.changes)
        return run(self.recipe, str(parent), str(out), Options()).out


def _steps(family: str, changes: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(step for step in STEPS if step.declined(declared(family, changes)) is None)


def forms() -> dict[str, Form]:
    """name -> a checkpoint of each family in each form that holds it, with rotary positions of its own."""
    made = {}
    native = loads("version: 1\nsteps:\n  - {op: prune_blocks, layers: [1, 4]}\n")
    for family in (*FAMILY_NAMES, *MIXTURE_NAMES, *ENCODER_NAMES):
        for kind, rope in ROPE.get(family, {"": {}}).items():
            made[f"native-{family}{kind}"] = Form(family, native, rope)
            one = loads("version: 1\nformat: surgeon\nsteps:\n  - {op: prune_attention, layers: [1, 3]}\n")
            made[f"surgeon-{family}{kind}"] = Form(family, one, rope)
    for name, (family, changes) in SURGEON.items():
        if name not in FAMILY_NAMES:
            rope = ROPE.get(family, {"": {}})[""] if name != "falcon-alibi" else {}
            made[f"surgeon-{name}"] = Form(
                family, Recipe(version=1, steps=_steps(family, changes)), {**rope, **changes}
            )
    for family in FAMILY_NAMES:
        steps = _steps(family, {})
        made[f"all-{family}"] = Form(family, Recipe(version=1, steps=steps), ROPE.get(family, {"": {}})[""])
    for name, (family, changes) in NAS.items():
        recipe = loads(f"version: 1\nformat: nemotron-nas\nsteps:{NAS_STEPS}")
        made[name] = Form(family, recipe, {**changes, **YARN})
    for name, (family, changes, steps) in MIXERS.items():
        made[name] = Form(family, Recipe(version=1, steps=steps), {**ROPE[family][""], **changes})
    for name, (family, changes, step) in BLOCK.items():
        made[name] = Form(family, Recipe(version=1, steps=(step,)), {**ROPE[family][""], **changes})
    return made


def write(base: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """The named checkpoints in `base`: name -> what loads it, the form, and the logits that it must give."""
    expected = {}
    for name in names:
        form = forms()[name]
        folder = form.write(base / name)
        with torch.no_grad():
            found = logits(load_model(str(folder)), TOKENS) if form.family not in ENCODER_NAMES else None
            if found is None:
                found = load_model(str(folder)).eval()(input_ids=TOKENS).logits
        expected[name] = {
            "auto": "AutoModelForMaskedLM" if form.family in ENCODER_NAMES else "AutoModelForCausalLM",
            "family": form.family,
            "code": sorted(path.name for path in folder.glob("*.py")),
            "logits": found[:, -1].tolist(),
        }
    (base / "expected.json").write_text(json.dumps(expected))
    return expected


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, sys.argv[2:] or list(forms()))
