"""GGUF files of every architecture that are cut short or lie: one kind of error, and it says where."""

from __future__ import annotations

import struct
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from gguf_models import export, save_uniform

from llmsurgeon.checkpoint.gguf.architectures import ARCHITECTURES, order
from llmsurgeon.checkpoint.gguf.file import GGUFFile
from llmsurgeon.checkpoint.opening import open_checkpoint
from llmsurgeon.errors import CheckpointError

FULL, SLIDING = "full_attention", "sliding_attention"
SETTINGS = {
    "falcon": {"bias": False},
    "gemma2": {"layer_types": [SLIDING, FULL]},
    "gemma3_text": {"layer_types": [SLIDING, FULL]},
    "smollm3": {"no_rope_layers": [1, 1]},
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen2": {"use_sliding_window": False},
}
# What no tensor contradicts in all families: Bloom's width is 4 times the model's whatever the key says.
FREE = {"feed_forward_length", "expert_used_count", "attention.head_count_kv", "vocab_size"}
FREE |= {"rope.dimension_count", "attention.sliding_window_pattern"}
FAMILIES = [family for family in ARCHITECTURES if family != "mistral"]


@cache
def whole(family: str) -> bytes:
    """A tiny model's file."""
    folder = Path(mkdtemp())
    save_uniform(folder / "model", family, num_hidden_layers=2, **SETTINGS.get(family, {}))
    return export(folder / "model", folder / "model.gguf").path.read_bytes()


def opened(folder: Path, data: bytes) -> str | None:
    """None where the file opens, else the CheckpointError's message."""
    path = folder / "m.gguf"
    path.write_bytes(data)
    try:
        open_checkpoint(path)
    except CheckpointError as error:
        return str(error)
    return None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_cut_short(family, tmp_path):
    data = whole(family)
    assert opened(tmp_path, data) is None
    for size in (100, len(data) // 3, len(data) - 64):
        assert "m.gguf: " in (opened(tmp_path, data[:size]) or "")


@pytest.mark.parametrize("family", FAMILIES)
def test_values_that_lie(family, tmp_path):
    """Each size at 0, 3 and 2^31 - 1: an error that names the file, or a value that no tensor contradicts."""
    data, name = whole(family), ARCHITECTURES[family].name
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    harmless = {"context_length", "attention.sliding_window"}
    for key, value in GGUFFile(path).metadata.items():
        short = key.removeprefix(f"{name}.")
        if short == key or type(value) is not int or short in harmless:
            continue
        at = data.index(key.encode()) + len(key) + 4
        for lie in (0, 3, 2**31 - 1):
            said = opened(tmp_path, data[:at] + struct.pack("<I", lie) + data[at + 4 :])
            if said is None:
                assert short in FREE, (key, lie)
            else:
                assert "m.gguf: " in said


@pytest.mark.parametrize("family", FAMILIES)
def test_values_that_are_missing(family, tmp_path):
    """Every key renamed in turn: what llama.cpp takes for granted then, or an error."""
    data, name = whole(family), ARCHITECTURES[family].name
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    for key in [key for key in GGUFFile(path).metadata if key.startswith(f"{name}.")]:
        said = opened(tmp_path, data.replace(key.encode(), b"x" * len(key)))
        assert said is None or "m.gguf: " in said
        if key.endswith(("block_count", "embedding_length", "head_count", "feed_forward_length")):
            assert said


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
@pytest.mark.parametrize(
    ("family", "target", "rows"),
    [
        ("llama", "blk.0.attn_q.weight", lambda heads, kv: heads),
        ("llama", "blk.0.attn_k.bias", lambda heads, kv: kv),
        ("falcon", "blk.0.attn_qkv.weight", lambda heads, kv: heads + 2 * kv),
        ("bloom", "blk.0.attn_qkv.bias", lambda heads, kv: heads + 2 * kv),
    ],
)
def test_orders_undo_themselves(family, target, rows, heads, kv_heads):
    found = order(ARCHITECTURES[family], target, heads, kv_heads, 8)
    weight = torch.randn(rows(heads, kv_heads) * 8, *([12] if target.endswith("weight") else []))
    there = found.there(weight)
    assert not torch.equal(there, weight) and torch.equal(found.back(there), weight)
    assert torch.equal(found.there(found.back(weight)), weight)
