"""native for models whose blocks differ: zeros stand in for what was cut, and the model stays the same."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from conftest import FAMILY_NAMES, save_tiny, tiny_config
from operations.helpers import logits, some_tokens

from llmsurgeon.checkpoint.opening import open_checkpoint
from llmsurgeon.checkpoint.transform import BLOCK_NUMBERS
from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats.configs import normalised
from llmsurgeon.formats.loading import load_model
from llmsurgeon.formats.padding import filled, padded, repeated
from llmsurgeon.formats.write import write_config
from llmsurgeon.model.families import FAMILIES
from llmsurgeon.model.parts import AttentionSpec, FFNSpec
from llmsurgeon.model.spec import LayerSpec, ModelSpec
from llmsurgeon.recipe.recipe import loads
from llmsurgeon.run import Options, run

# No attention in the first block, no FFN in the second, and a narrow one.
STEPS = """
  - {op: prune_attention, layers: [0, 3]}
  - {op: prune_ffn, layers: [1]}
  - {op: prune_width, width: 40, layers: [5], score: magnitude}
"""


def recipe_of(steps: str, format: str) -> Any:
    return loads(f"version: 1\nformat: {format}\nsteps:{steps}")


def steps_for(family: str) -> str:
    """The steps that the family does not decline."""
    declined = {operation for operation, _ in FAMILIES[family].unsupported}
    return "\n".join(line for line in STEPS.splitlines() if not any(f"op: {op}," in line for op in declined)) + "\n"


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_zeros_compute_the_cut_model(tmp_path, family):
    parent = str(save_tiny(tmp_path / "parent", family))
    made = {
        f: run(recipe_of(steps_for(family), f), parent, str(tmp_path / f), Options()) for f in ("surgeon", "native")
    }
    config = json.loads((made["native"].out / "config.json").read_text())
    assert config["model_type"] == family and "block_configs" not in config
    tokens = some_tokens()
    cut, whole, before = (load_model(str(f)) for f in (made["surgeon"].out, made["native"].out, parent))
    torch.testing.assert_close(logits(whole, tokens), logits(cut, tokens), atol=2e-5, rtol=0)
    assert (logits(whole, tokens) - logits(before, tokens)).abs().max() > 1e-3
    # Every part is back, so nothing is saved, and plan and card say so.
    after = made["native"].planned.after
    assert (after.attentions, after.ffns) == (6, 6) and after.parameters > made["surgeon"].planned.after.parameters
    assert "no smaller and no faster" in (made["native"].out / "README.md").read_text()
    assert not list(made["native"].out.glob("*.py"))


def test_key_value_heads_are_repeated(tmp_path):
    """4, 2 and 1 KV heads in one model: each smaller group becomes copies, exactly."""
    parent = str(save_tiny(tmp_path / "parent", "qwen2", num_key_value_heads=4, use_sliding_window=False))
    steps = """
  - {op: prune_kv_heads, kv_heads: 2, layers: [1, 2]}
  - {op: prune_kv_heads, kv_heads: 1, layers: [4]}
"""
    made = [run(recipe_of(steps, f), parent, str(tmp_path / f), Options()).out for f in ("surgeon", "native")]
    cut, whole = (load_model(str(folder)) for folder in made)
    torch.testing.assert_close(logits(whole, some_tokens()), logits(cut, some_tokens()), atol=1e-5, rtol=0)
    own, repeat = (open_checkpoint(str(folder))["model.layers.4.self_attn.k_proj.bias"] for folder in made)
    assert torch.equal(repeat, own.repeat(4))


def test_what_zeros_cannot_do():
    attention, ffn = AttentionSpec(4, 2, 8), FFNSpec(96)
    both = LayerSpec(attention, ffn, (0,))
    config = normalised(tiny_config("llama", num_hidden_layers=2))
    parallel = ModelSpec("llama", 32, 64, (both, LayerSpec(None, None, (1,), (both, both))), False)
    with pytest.raises(
        SurgeryError, match=r"format native .* block 1 runs 2 blocks in parallel; formats that can: surgeon"
    ):
        write_config(parallel, FAMILIES["llama"], config, "native")
    without = ModelSpec("llama", 32, 64, (LayerSpec(attention, None, (0,)), LayerSpec(attention, None, (1,))), False)
    with pytest.raises(SurgeryError, match="no block has an FFN; formats that can: nemotron-nas, surgeon"):
        write_config(without, FAMILIES["llama"], config, "native")


def cat(made: Any) -> torch.Tensor:
    return torch.cat(list(made))


def test_padding_against_the_slow_version():
    matrix = torch.randn(6, 5)
    assert torch.equal(cat(padded((8, 7))(matrix)), torch.nn.functional.pad(matrix, (0, 2, 0, 2)))
    assert torch.equal(cat(padded((9,))(matrix[:, 0])), torch.nn.functional.pad(matrix[:, 0], (0, 3)))
    # Gate over up: each is padded where it ends.
    gate, up = matrix.chunk(2)
    zeros = torch.zeros(2, 5)
    assert torch.equal(cat(padded((10, 5), stacked=2)(matrix)), torch.cat([gate, zeros, up, zeros]))
    assert torch.equal(cat(repeated(3, 2)(matrix)), matrix.unflatten(0, (3, 2)).repeat_interleave(3, 0).flatten(0, 1))
    lender = torch.ones(2, dtype=torch.bfloat16)
    assert torch.equal(cat(filled((3, 2), 1.0)(lender)), torch.ones(3, 2, dtype=torch.bfloat16))


def test_large_tensors_come_in_blocks():
    blocks = list(padded((4096, 512))(torch.ones(2000, 300)))
    assert torch.cat(blocks).shape == (4096, 512) and max(layer.numel() for layer in blocks) <= 2 * BLOCK_NUMBERS
    assert max(layer.numel() for layer in filled((4096, 512), 0.0)(torch.ones(1))) <= BLOCK_NUMBERS
    meta = list(padded((4096, 512))(torch.ones(2000, 300, device="meta")))
    assert torch.cat(meta).shape == (4096, 512) and len(meta) == 2
