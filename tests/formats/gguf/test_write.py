"""GGUF out: held against a real llama.cpp where it is installed, and against the file's own bytes where it is not."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import tiny_config
from gguf_models import UNEVEN, export, largest_difference, save_uneven, save_uniform, ternary_folder

from llmsurgeon.checkpoint.gguf.file import GGUFFile
from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats.configs import normalised
from llmsurgeon.formats.gguf import write as writing
from llmsurgeon.formats.gguf.kinds import TYPES
from llmsurgeon.formats.gguf.model import ARCHITECTURES, lay_out
from llmsurgeon.formats.gguf.rope import llama3_factors
from llmsurgeon.formats.loading import load_model
from llmsurgeon.formats.models import empty_model, expected_shapes
from llmsurgeon.model.families import FAMILIES
from llmsurgeon.planning.opened import open_model

Kind = gguf.GGMLQuantizationType
SLIDING, FULL = "sliding_attention", "full_attention"
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1 + i / 20 for i in range(8)],
    "long_factor": [2 + i / 2 for i in range(8)],
    "original_max_position_embeddings": 16,
}
# (family, settings, largest difference): llama.cpp computes GELU from a table in float16.
UNIFORM = [
    ("llama", {}, 1e-4),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, 1e-4),
    ("llama", {"rope_parameters": LLAMA3, "head_dim": 24}, 1e-4),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}, 1e-4),
    ("llama", {"rope_parameters": YARN}, 1e-4),
    ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.5}}, 1e-4),
    ("mistral", {"sliding_window": None}, 1e-4),
    ("qwen2", {"use_sliding_window": False}, 1e-4),
    ("qwen3", {}, 1e-4),
    ("gpt2", {}, 5e-3),
    ("gpt_neox", {}, 5e-3),
    ("gpt_neox", {"use_parallel_residual": False, "tie_word_embeddings": True}, 5e-3),
    ("phi3", {"pad_token_id": 0}, 1e-4),
    ("phi3", {"pad_token_id": 0, "rope_parameters": LONG, "original_max_position_embeddings": 16}, 1e-4),
    ("gemma2", {"layer_types": [SLIDING, FULL] * 3, "query_pre_attn_scalar": 24}, 2e-2),
    ("gemma3_text", {"layer_types": [SLIDING, SLIDING, FULL] * 2, "query_pre_attn_scalar": 24}, 3e-2),
    ("olmo2", {"tie_word_embeddings": True}, 1e-4),
    ("granite", {"attention_bias": True, "mlp_bias": True}, 1e-4),
    ("smollm3", {"no_rope_layers": [1, 1, 1, 0, 1, 1]}, 1e-4),
    ("stablelm", {}, 1e-4),
    ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True}, 1e-4),
    ("falcon", {"bias": False}, 5e-3),
    ("falcon", {"bias": False, "new_decoder_architecture": False, "multi_query": True}, 5e-3),
    ("bloom", {}, 5e-3),
    ("mixtral", {"sliding_window": None}, 1e-4),
    ("qwen3_moe", {"norm_topk_prob": True}, 1e-4),
]


@pytest.mark.parametrize(("family", "settings", "tolerance"), UNIFORM, ids=lambda v: v if isinstance(v, str) else None)
def test_llamacpp_computes_what_transformers_does(family, settings, tolerance, tmp_path):
    pytest.importorskip("xllamacpp")
    folder = save_uniform(tmp_path / "model", family, **settings)
    made = export(folder, tmp_path / "model.gguf")
    assert made.architecture == ARCHITECTURES[family].name
    lengths = (40,) if "LongRoPE" in str(made.notes) else (5, 19, 40)
    assert largest_difference(load_model(str(folder)), made.path, lengths) < tolerance


# Further layouts that a file tells apart.
READ_BACK = [
    *(case for case in UNIFORM if case[1].get("rope_parameters") != LLAMA3),
    ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 8192}, "head_dim": 24}, 0),
    ("gpt2", {"tie_word_embeddings": False}, 0),
    ("falcon", {"bias": False, "num_ln_in_parallel_attn": 1}, 0),
    ("falcon", {"bias": False, "new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 4}, 0),
    ("gemma2", {"layer_types": [SLIDING, FULL] * 3, "attn_logit_softcapping": None}, 0),
]
# Of the two, llama.cpp has one: it runs Mistral's models under Llama's name.
SAME = {"mistral": "llama"}


@pytest.mark.parametrize(
    ("family", "settings", "tolerance"), READ_BACK, ids=lambda v: v if isinstance(v, str) else None
)
def test_uniform_models_come_back_as_they_were(family, settings, tolerance, tmp_path):
    folder = save_uniform(tmp_path / "model", family, **settings)
    export(folder, tmp_path / "model.gguf")
    before, after = open_model(str(folder)), open_model(str(tmp_path / "model.gguf"))
    assert after.family.model_type == SAME.get(family, family)
    # ALiBi has no last position, and Bloom's class no key for one.
    limit = after.spec.max_positions if family == "bloom" else before.spec.max_positions
    assert replace(after.spec, family=family) == replace(before.spec, max_positions=limit)
    assert set(after.weights) == set(before.weights)
    scaled = settings.get("query_pre_attn_scalar", 16) != 16  # Gemma's queries carry what their scale differs by
    for name, tensor in before.weights.items():
        if family.startswith("gemma") and ("norm" in name or (scaled and "q_proj" in name)):
            continue
        assert torch.equal(after.weights[name], tensor), name
    gains = [name for name in before.weights if name.endswith("norm.weight") and not (scaled and "q_norm" in name)]
    for name in gains:  # 1 + w is rounded where w is stored so
        torch.testing.assert_close(after.weights[name], before.weights[name], rtol=0, atol=1.2e-7)
    ids = torch.arange(30)[None]
    model, again = load_model(str(folder)), load_model(str(tmp_path / "model.gguf"))
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=2e-5)
        if not family.startswith("gemma"):
            assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("llama", {"head_dim": 24, "rope_parameters": LLAMA3}),
        ("mistral", {"sliding_window": 64}),
        ("qwen2", {"use_sliding_window": False}),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_uneven_models_run_in_llamacpp(family, settings, tmp_path):
    pytest.importorskip("xllamacpp")
    folder = save_uneven(tmp_path / "model", family, **settings)
    made = export(folder, tmp_path / "model.gguf")
    assert made.architecture == "deci"
    assert largest_difference(load_model(str(folder)), made.path) < 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_uneven_models_come_back_as_they_were(family, tmp_path):
    settings = {"use_sliding_window": False} if family == "qwen2" else {"attention_bias": True, "mlp_bias": True}
    folder = save_uneven(tmp_path / "model", family, **settings)
    export(folder, tmp_path / "model.gguf")
    before, after = open_model(str(folder)), open_model(str(tmp_path / "model.gguf"))
    assert after.spec == before.spec and after.family == before.family
    assert set(after.weights) == set(before.weights)
    assert all(torch.equal(after.weights[name], before.weights[name]) for name in before.weights)
    ids = torch.arange(30)[None]
    model, again = load_model(str(folder)), load_model(str(tmp_path / "model.gguf"))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    "rope", [LLAMA3 | {"original_max_position_embeddings": 8192}, YARN | {"attention_factor": 1.5}]
)
def test_rope_scaling_comes_back(rope, tmp_path):
    folder = save_uniform(tmp_path / "model", "llama", rope_parameters=rope, max_position_embeddings=16384)
    export(folder, tmp_path / "model.gguf")
    found = open_model(str(tmp_path / "model.gguf")).config["rope_parameters"]
    assert found == {key: pytest.approx(value) if isinstance(value, float) else value for key, value in rope.items()}


def test_metadata_and_tensors_of_an_uneven_model(tmp_path):
    folder = save_uneven(tmp_path / "model", tie_word_embeddings=True)
    export(folder, tmp_path / "model.gguf", name="a model")
    file = GGUFFile(tmp_path / "model.gguf")
    value = file.metadata
    assert value["general.architecture"] == "deci" and value["general.name"] == "a model"
    assert value["general.file_type"] == 0
    assert value["deci.attention.head_count"] == [4, 4, 0, 4, 4, 0]
    assert value["deci.attention.head_count_kv"] == [2, 1, 0, 2, 4, 0]
    assert value["deci.feed_forward_length"] == [96, 64, 200, 32, 96, 128]
    assert value["deci.attention.key_length"] == value["deci.rope.dimension_count"] == 16
    assert "blk.2.attn_norm.weight" not in file.entries and "blk.2.ffn_norm.weight" in file.entries
    assert "output.weight" not in file.entries
    parent = open_model(str(folder))
    for block, heads in ((0, 4), (3, 4)):
        name = f"model.layers.{block}.self_attn.q_proj.weight"
        weight = parent.weights[name].numpy().reshape(heads, 16, 64)
        # Row 2i of a head is its row i, row 2i + 1 the one that turns with it, half a head on.
        expected = np.stack([weight[:, i // 2 + (i % 2) * 8] for i in range(16)], axis=1).reshape(64, 64)
        assert np.array_equal(file.rows(f"blk.{block}.attn_q.weight", 0, 64), expected)


@pytest.mark.parametrize("name", TYPES)
def test_types(name, tmp_path):
    folder = save_uniform(tmp_path / "model", "llama", hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    if name.startswith("TQ"):
        folder = ternary_folder(folder)
    made = export(folder, tmp_path / "model.gguf", type=name.lower())
    file = GGUFFile(made.path)
    kinds = {tensor: Kind(entry.kind).name for tensor, entry in file.entries.items()}
    assert kinds["blk.0.ffn_up.weight"] == name and made.type == name and made.notes == ()
    assert kinds["blk.0.ffn_norm.weight"] == kinds["output_norm.weight"] == "F32"
    embeddings = name if name in ("F32", "F16", "BF16") else "F16" if name.startswith("TQ") else "Q8_0"
    assert kinds["token_embd.weight"] == kinds["output.weight"] == embeddings
    weights = open_model(str(folder)).weights["model.layers.0.mlp.up_proj.weight"]
    expected = gguf.quants.dequantize(gguf.quantize(weights.numpy(), Kind[name]), Kind[name])
    assert np.array_equal(file.rows("blk.0.ffn_up.weight", 0, 256), expected.astype(np.float32))
    reread = open_model(str(made.path)).weights["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(reread, torch.from_numpy(expected.astype(np.float32)).to(reread.dtype))


# Of ffn_up, attn_v, attn_output, ffn_down.
MIXED = {
    "Q2_K": (Kind.Q2_K, Kind.Q3_K, Kind.Q3_K, Kind.Q3_K),
    "Q3_K_M": (Kind.Q3_K, Kind.Q5_K, Kind.Q4_K, Kind.Q4_K),
    "Q4_K_M": (Kind.Q4_K, Kind.Q6_K, Kind.Q4_K, Kind.Q6_K),
    "Q5_K_S": (Kind.Q5_K, Kind.Q5_K, Kind.Q5_K, Kind.Q5_K),
    "IQ4_XS": (Kind.IQ4_XS, Kind.IQ4_XS, Kind.IQ4_XS, Kind.IQ4_XS),
}


@pytest.mark.parametrize("name", MIXED)
def test_mixtures_give_some_tensors_more_bits(name, tmp_path):
    pytest.importorskip("xllamacpp")
    folder = save_uniform(tmp_path / "model", "llama", hidden_size=256, intermediate_size=256, num_hidden_layers=4)
    made = export(folder, tmp_path / "model.gguf", type=name)
    file = GGUFFile(made.path)
    kinds = {tensor: entry.kind for tensor, entry in file.entries.items()}
    special = 0 if name == "Q3_K_M" else 3  # of the values that get more
    parts = ("1.ffn_up", f"{special}.attn_v", "3.attn_output", "3.ffn_down")
    assert tuple(kinds[f"blk.{part}.weight"] for part in parts) == MIXED[name]
    assert kinds["output.weight"] == Kind.Q6_K and kinds["token_embd.weight"] == MIXED[name][0]
    assert file.metadata["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{name}"] and made.type == name
    weights = open_model(str(folder)).weights["model.layers.0.mlp.up_proj.weight"].numpy()
    error = np.square(file.rows("blk.0.ffn_up.weight", 0, 256) - weights).mean() / np.square(weights).mean()
    assert error < {Kind.Q2_K: 0.12, Kind.Q3_K: 0.04}.get(MIXED[name][0], 0.01)


def test_mixtures_of_rows_that_are_no_whole_blocks_run_in_llamacpp(tmp_path):
    pytest.importorskip("xllamacpp")
    folder = save_uneven(tmp_path / "model", shapes=[(h, kv, 128) for h, kv, _ in UNEVEN])
    made = export(folder, tmp_path / "model.gguf", type="Q4_K_M")
    kinds = {Kind(entry.kind).name for entry in GGUFFile(made.path).entries.values()}
    assert kinds == {"F32", "Q5_0", "Q8_0"} and "are Q5_0, Q8_0: their rows" in made.notes[-1]
    assert largest_difference(load_model(str(made.path), dtype=torch.float32), made.path) < 0.2


def test_a_mixture_without_its_quantizer_is_refused_before_any_work(tmp_path, monkeypatch):
    from llmsurgeon.formats.gguf import llama_quantizer

    folder = save_uniform(tmp_path / "model", "llama")
    monkeypatch.setattr(llama_quantizer, "find_spec", lambda name: None)
    llama_quantizer._library.cache_clear()
    with pytest.raises(SurgeryError, match=r"Q4_K_M is made by llama.cpp's own quantizer.*llmsurgeon\[llamacpp\]"):
        export(folder, tmp_path / "model.gguf", type="Q4_K_M")
    assert list(tmp_path.iterdir()) == [folder]


def test_every_type_that_the_gguf_package_makes_is_offered():
    made = set()
    for kind in Kind:
        try:
            gguf.quantize(np.ones((1, 512), np.float32), kind)
        except NotImplementedError:
            continue
        made.add(kind.name)
    assert made == set(TYPES)


def test_rows_that_are_not_whole_blocks_stay_half_precision(tmp_path):
    folder = save_uniform(tmp_path / "model", "llama", intermediate_size=80)
    made = export(folder, tmp_path / "model.gguf", type="Q8_0")
    kinds = {name: Kind(entry.kind).name for name, entry in GGUFFile(made.path).entries.items()}
    assert kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.0.ffn_up.weight"] == "Q8_0"
    (note,) = made.notes
    assert note.startswith("6 tensors, blk.0.ffn_down.weight the first, are F16")


@pytest.mark.parametrize("name", ["F16", "Q8_0", "Q4_0"])
def test_llamacpp_loads_other_types(name, tmp_path):
    pytest.importorskip("xllamacpp")
    folder = save_uneven(tmp_path / "model", shapes=[(h, kv, 128) for h, kv, _ in UNEVEN])
    made = export(folder, tmp_path / "model.gguf", type=name)
    reread = load_model(str(made.path), dtype=torch.float32)
    # The same quantised weights; llama.cpp also rounds what it multiplies them with.
    assert largest_difference(reread, made.path) < {"F16": 0.01, "Q8_0": 0.2, "Q4_0": 0.2}[name]


def test_large_tensors_are_written_in_parts(tmp_path, monkeypatch):
    folder = save_uniform(tmp_path / "model", "llama")
    export(folder, tmp_path / "whole.gguf", type="Q8_0", name="a")
    monkeypatch.setattr(writing, "NUMBERS_AT_ONCE", 200)
    seen = []
    made = export(folder, tmp_path / "parts.gguf", type="Q8_0", name="a", progress=lambda *now: seen.append(now))
    assert (tmp_path / "parts.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    tensors = GGUFFile(made.path).entries.values()
    assert seen[-1] == (sum(t.end - t.start for t in tensors),) * 2 and len(seen) > len(tensors)


def test_windows_end_the_context(tmp_path):
    made = export(save_uniform(tmp_path / "model", "mistral", sliding_window=8), tmp_path / "model.gguf")
    assert made.notes == (
        "llama.cpp's llama has no sliding window: context_length is 8, up to which it computes the same",
    )
    assert GGUFFile(made.path).metadata["llama.context_length"] == 8


def refused(tmp_path: Path, folder: Path, **options) -> str:
    with pytest.raises(SurgeryError) as caught:
        export(folder, tmp_path / "out" / "model.gguf", **options)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
    return str(caught.value)


def test_uneven_models_of_other_families(tmp_path):
    said = refused(tmp_path, save_uneven(tmp_path / "model", "qwen3", [(4, 2, 96), (0, 0, 96)]))
    assert "block 1 has no attention, and llama.cpp's qwen3 has one shape for all blocks; formats that can" in said
    assert said.endswith("native, surgeon (a GGUF can be made of native, which fills up with zeros)")


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(0, 0, 96), (4, 2, 96)], "block 0 has no attention, and llama.cpp sizes its cache"),
        ([(4, 2, 96), (4, 2, None)], "block 1 has attention and no FFN, and llama.cpp leaves such attention out"),
        ([(4, 2, 96), (0, 0, None), (4, 2, 96)], "block 1 is empty, which llama.cpp cannot run"),
    ],
)
def test_blocks_that_llamacpp_cannot_run(shapes, message, tmp_path):
    assert message in refused(tmp_path, save_uneven(tmp_path / "model", "llama", shapes))


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "llama computes silu or swish, config.json says hidden_act gelu"),
        ("llama", {"rope_parameters": {**YARN, "beta_slow": 2.0}}, "no YaRN with beta_slow 2.0"),
        ("qwen3", {"attention_bias": True}, "qwen3 takes attention_bias False for granted, config.json says True"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 1, 1, 1]}, "smollm3 gives block 1 the rotary positions"),
        ("gemma2", {"layer_types": [FULL, SLIDING, SLIDING] * 2}, "every nth block attends to everything"),
        ("falcon", {"bias": True}, "falcon takes bias False for granted"),
        ("opt", {}, "llama.cpp has no architecture for opt models"),
    ],
)
def test_settings_that_llamacpp_has_no_word_for(family, settings, message, tmp_path):
    config = normalised(tiny_config(family, **settings))
    spec = FAMILIES[family].describe(config)
    weights = {n: torch.empty(s, device="meta") for n, s in expected_shapes(empty_model(config)).items()}
    with pytest.raises(SurgeryError, match=message):
        lay_out(config, FAMILIES[family], spec, weights)


def test_llama3_factors_are_what_transformers_divides_by():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    sizes = dict(hidden_size=64, num_attention_heads=4, max_position_embeddings=128)
    plain = LlamaRotaryEmbedding(LlamaConfig(**sizes)).inv_freq
    scaled = LlamaRotaryEmbedding(LlamaConfig(**sizes, rope_parameters=LLAMA3)).inv_freq
    torch.testing.assert_close(llama3_factors(LLAMA3, 16), plain / scaled)


def test_numbers_that_do_not_fit(tmp_path):
    folder = save_uniform(tmp_path / "model", "llama", num_hidden_layers=1)
    from safetensors.torch import load_file, save_file

    for value, message in (
        (1e6, "beyond float16's range; write it with --type BF16"),
        (float("nan"), "NaN or infinity"),
    ):
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.0.mlp.up_proj.weight"][3, 5] = value
        save_file(weights, folder / "model.safetensors")
        assert message in refused(tmp_path, folder, type="F16")


def test_existing_files(tmp_path):
    folder = save_uniform(tmp_path / "model", "llama", num_hidden_layers=1)
    out = tmp_path / "model.gguf"
    out.write_text("precious")
    with pytest.raises(SurgeryError, match="exists already; choose another name or pass --overwrite"):
        export(folder, out)
    assert out.read_text() == "precious"
    export(folder, out, overwrite=True)
    with pytest.raises(SurgeryError, match="is where the model is read from"):
        export(out, out, overwrite=True)
    with pytest.raises(SurgeryError, match=r"ends in \.gguf"):
        export(folder, tmp_path / "model.bin")
    with pytest.raises(SurgeryError, match=r"GGUF type 'IQ2_XS' cannot be made here; those that can are F32, BF16"):
        export(folder, tmp_path / "other.gguf", type="IQ2_XS")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.gguf"]


def test_a_full_disk_leaves_nothing(tmp_path):
    folder = save_uniform(tmp_path / "model", "llama")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        said = refused(tmp_path, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "the file would exceed the size that the system allows. Nothing was written" in said


def test_two_runs_for_one_file(tmp_path):
    from llmsurgeon.checkpoint.writer import FileStage

    folder = save_uniform(tmp_path / "model", "llama", num_hidden_layers=1)
    with (
        FileStage.open(tmp_path / "model.gguf", job={"verb": "export"}),
        pytest.raises(SurgeryError, match="another run is writing it now"),
    ):
        export(folder, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()
    export(folder, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf.partial").exists()


def test_a_download_beside_it_and_what_a_link_leads_to_stay(tmp_path):
    folder = save_uniform(tmp_path / "model", "llama", num_hidden_layers=1)
    partial, mine = tmp_path / "model.gguf.partial", tmp_path / "mine"
    mine.write_text("precious")
    for make in (lambda: partial.write_text("precious"), lambda: partial.symlink_to(mine)):
        make()
        with pytest.raises(SurgeryError, match="move it away or choose another output"):
            export(folder, tmp_path / "model.gguf")
        assert partial.read_text() == mine.read_text() == "precious"
        partial.unlink()
