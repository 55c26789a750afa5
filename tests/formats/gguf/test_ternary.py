"""Ternary weights in GGUF: every number exact, in the type of fewest bits that holds it; run by a real llama.cpp."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf_models import export, largest_difference, round_inputs, save_uniform, ternary_folder

from llmsurgeon.checkpoint.gguf.file import GGUFFile
from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats.gguf.ternary import exact_kind, ternary_q4_0
from llmsurgeon.formats.loading import load_model
from llmsurgeon.model.ternary import Grid, is_ternary, rounded
from llmsurgeon.planning.opened import open_model

Kind = gguf.GGMLQuantizationType
WIDE = {"hidden_size": 256, "intermediate_size": 512}
NARROW = {"hidden_size": 64, "intermediate_size": 256}


def kinds_of(path):
    return {name: Kind(entry.kind).name for name, entry in GGUFFile(path).entries.items()}


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0"])
@pytest.mark.parametrize(("family", "grid"), [
    ("llama", {}),
    ("llama", {"granularity": "row"}),
    ("llama", {"granularity": "group", "group_size": 256}),
    ("qwen3", {}),
    ("phi3", {"granularity": "row"}),
])  # fmt: skip
def test_what_is_read_back_is_what_was_written(tmp_path, name, family, grid):
    pad = {"phi3": {"pad_token_id": 0}, "qwen3": {"head_dim": 64}}.get(family, {})
    folder = ternary_folder(save_uniform(tmp_path / "model", family, num_hidden_layers=2, **WIDE, **pad), **grid)
    made = export(folder, tmp_path / "model.gguf", type=name, float_type="F32")
    kinds = kinds_of(made.path)
    linears = {tensor for tensor in kinds if tensor.startswith("blk.") and "norm" not in tensor}
    assert {kinds[tensor] for tensor in linears} == {name} and made.notes == ()
    assert {kinds[tensor] for tensor in kinds if tensor not in linears} == {"F32"}
    if family == "phi3":  # not read back from GGUF
        return
    before, after = open_model(str(folder)).weights, open_model(str(made.path)).weights
    for tensor in before:
        assert torch.equal(after[tensor].float(), before[tensor].bfloat16().float()), tensor
        if is_ternary(before[tensor]):
            whole = load_model(str(made.path), dtype=torch.float32).state_dict()[tensor]
            assert torch.equal(whole, after[tensor].float())


def test_exact_types():
    weight = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    assert exact_kind(weight, Kind.TQ2_0) is None and exact_kind(torch.zeros(8, 512), Kind.TQ2_0) is None
    assert exact_kind(rounded(weight, Grid()), Kind.TQ2_0) is Kind.TQ2_0
    assert exact_kind(rounded(weight, Grid(granularity="row")), Kind.TQ1_0) is Kind.TQ1_0
    assert exact_kind(rounded(weight, Grid(granularity="group", group_size=64)), Kind.TQ2_0) is Kind.Q4_0
    assert exact_kind(rounded(weight[:, :96], Grid()), Kind.TQ2_0) is Kind.Q4_0
    assert exact_kind(rounded(weight[:, :40], Grid()), Kind.TQ2_0) is None
    assert exact_kind(rounded(weight, Grid()) * 1.0001, Kind.TQ2_0) is None, "a scale that float16 does not hold"


@pytest.mark.parametrize("size", [32, 96, 256])
def test_q4_0_blocks_of_ternary_weights_are_exact(size):
    weight = torch.randn(8, size, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        made = rounded(weight.to(dtype), Grid(granularity="group", group_size=32)).float().numpy()
        made[3] = 0
        packed = ternary_q4_0(made)
        assert packed.shape == (8, size // 32 * 18) and packed.dtype == np.uint8
        assert np.array_equal(gguf.quants.dequantize(packed, Kind.Q4_0), made)
        assert not np.array_equal(gguf.quants.dequantize(gguf.quantize(made, Kind.Q4_0), Kind.Q4_0), made)


def test_rows_that_are_no_whole_blocks_go_to_the_nearest_type_that_is_exact(tmp_path):
    folder = ternary_folder(save_uniform(tmp_path / "model", "llama", num_hidden_layers=3, **NARROW), layers=[0, 2])
    made = export(folder, tmp_path / "model.gguf", type="TQ2_0")
    kinds = kinds_of(made.path)
    assert kinds["blk.0.ffn_down.weight"] == "TQ2_0" and kinds["blk.0.ffn_up.weight"] == "Q4_0"
    assert {kind for name, kind in kinds.items() if name.startswith("blk.1.") and "norm" not in name} == {"F16"}
    assert kinds["token_embd.weight"] == "F16" and kinds["output_norm.weight"] == "F32"
    (note,) = made.notes
    assert note.startswith("12 ternary tensors, blk.0.attn_k.weight the first, are Q4_0, which holds them exactly")
    before, after = open_model(str(folder)).weights, open_model(str(made.path)).weights
    for name in before:
        if is_ternary(before[name]):
            assert torch.equal(after[name].float(), before[name].bfloat16().float())


@pytest.mark.parametrize(("options", "message"), [
    ({"type": "TQ2_0"}, "GGUF type TQ2_0 is for ternary weights, and this model has none; run `llmsurgeon ternary`"),
    ({"type": "TQ2_0", "float_type": "Q8_0"}, "GGUF float type 'Q8_0': expected one of F32, F16, BF16"),
    ({"type": "Q8_0", "float_type": "F16"}, "a float type goes with TQ1_0 and TQ2_0"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(tmp_path, options, message):
    folder = save_uniform(tmp_path / "model", "llama", num_hidden_layers=2, **WIDE)
    with pytest.raises(SurgeryError, match=message):
        export(folder, tmp_path / "out.gguf", **options)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0"])
@pytest.mark.parametrize("sizes", [WIDE, NARROW], ids=["whole blocks", "Q4_0 too"])
def test_llamacpp_agrees_with_the_plain_checkpoint(tmp_path, name, sizes):
    pytest.importorskip("xllamacpp")
    folder = ternary_folder(save_uniform(tmp_path / "model", "llama", num_hidden_layers=4, **sizes))
    made = export(folder, tmp_path / "model.gguf", type=name, float_type="F32")
    reference = load_model(str(folder), dtype=torch.float32)
    difference = largest_difference(reference, made.path)
    print(f"largest difference {difference:.4f}")
    # The weights are equal; llama.cpp rounds what they are multiplied with to 8 bits, and that is all.
    assert 0.005 < difference < 0.05
    round_inputs(reference, made.path)
    # In the narrow model one code lies at an edge and falls the other way.
    assert largest_difference(reference, made.path) < (1e-4 if sizes is WIDE else 0.01)
