"""nemotron-nas: what other engines read of it, what it can hold, and that the same model comes back."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny, tiny_config, tiny_model
from operations.helpers import logits, some_tokens, subject_of

from llmsurgeon.checkpoint.opening import open_checkpoint
from llmsurgeon.checkpoint.transform import TransformedWeights
from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats.configs import normalised
from llmsurgeon.formats.loading import load_model
from llmsurgeon.formats.nemotron_nas import padded_width, read, waste, width_of
from llmsurgeon.formats.write import write_config
from llmsurgeon.model.families import FAMILIES
from llmsurgeon.model.parts import AttentionSpec, FFNSpec
from llmsurgeon.model.spec import LayerSpec, ModelSpec
from llmsurgeon.planning.opened import open_config
from llmsurgeon.planning.plan import plan
from llmsurgeon.recipe.recipe import loads
from llmsurgeon.run import Options, run

# No attention in layers 1 and 2, whose FFNs fuse; no FFN in the last; a width that is no multiple of 256.
STEPS = """
  - {op: prune_attention, layers: [1, 2]}
  - {op: prune_ffn, layers: [5]}
  - {op: prune_width, width: 200, layers: [4], score: magnitude}
  - {op: fuse_ffn, runs: [1-2]}
"""
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
WIDE = {"intermediate_size": 512}
PARENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", WIDE),
    "llama-tied-scaled": ("llama", {**WIDE, "tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
    "llama-biases": ("llama", {**WIDE, "attention_bias": True}),
    "mistral": ("mistral", {**WIDE, "sliding_window": None}),
    "qwen2": ("qwen2", {**WIDE, "use_sliding_window": False}),
}


def recipe_of(steps: str, format: str = "auto") -> Any:
    return loads(f"version: 1\nformat: {format}\nsteps:{steps}")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """name -> the nemotron-nas checkpoint of one of PARENTS; surgeon-NAME is the same model in the surgeon format."""
    base = tmp_path_factory.mktemp("nas")
    made = {}
    for name, (family, changes) in PARENTS.items():
        parent = str(save_tiny(base / f"parent-{name}", family, **changes))
        for format, label in (("nemotron-nas", name), ("surgeon", f"surgeon-{name}")):
            made[label] = run(recipe_of(STEPS, format), parent, str(base / label), Options()).out
    return made


def config_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


# The contract with those who read the form, from their public sources, in our own words.

NUMBER, WHOLE, FLAG, TEXT = (int, float), int, bool, str


@dataclass(frozen=True)
class Reader:
    """What an engine takes from config.json: key -> type where a part is there; absent parts are dealt with below.

    only: whether an entry of block_configs may hold no further key.
    none_means_absent: whether a part is told absent by null, not by no_op alone.
    """

    source: str
    top: Mapping[str, Any]
    attention: Mapping[str, Any]
    ffn: Mapping[str, Any]
    only: frozenset[str] = frozenset()
    none_means_absent: bool = False


COMMON = {
    "hidden_size": WHOLE,
    "num_hidden_layers": WHOLE,
    "num_attention_heads": WHOLE,
    "rms_norm_eps": float,
    "vocab_size": WHOLE,
    "max_position_embeddings": WHOLE,
    "tie_word_embeddings": FLAG,
    "hidden_act": TEXT,
}
READERS = {
    "vLLM": Reader(
        "vllm-project/vllm: vllm/model_executor/models/nemotron_nas.py",
        {**COMMON, "attention_bias": FLAG, "mlp_bias": FLAG, "rope_parameters": dict},
        {"no_op": FLAG, "n_heads_in_group": WHOLE},
        {"no_op": FLAG, "ffn_mult": NUMBER},
    ),
    "SGLang": Reader(
        "sgl-project/sglang: python/sglang/srt/models/nemotron_nas.py",
        {**COMMON, "attention_bias": FLAG, "rope_theta": NUMBER, "rope_scaling": (dict, type(None))},
        {"no_op": FLAG, "n_heads_in_group": WHOLE},
        {"no_op": FLAG, "ffn_mult": NUMBER},
    ),
    "TensorRT-LLM": Reader(
        "NVIDIA/TensorRT-LLM: tensorrt_llm/_torch/models/modeling_nemotron_nas.py, models/nemotron_nas/convert.py",
        {**COMMON, "torch_dtype": TEXT, "rope_theta": NUMBER, "rope_scaling": (dict, type(None))},
        {"no_op": FLAG, "replace_with_linear": FLAG, "sparsify": type(None), "n_heads_in_group": WHOLE},
        {"no_op": FLAG, "replace_with_linear": FLAG, "sparsify": type(None), "ffn_mult": NUMBER},
        none_means_absent=True,
    ),
    "mlx-lm": Reader(
        "ml-explore/mlx-lm: mlx_lm/models/nemotron-nas.py",
        {
            **COMMON,
            "attention_bias": FLAG,
            "mlp_bias": FLAG,
            "rope_theta": NUMBER,
            "rope_scaling": (dict, type(None)),
        },
        {"no_op": FLAG, "replace_with_linear": FLAG, "n_heads_in_group": WHOLE},
        {"no_op": FLAG, "replace_with_linear": FLAG, "ffn_mult": NUMBER},
        # It builds records of these fields, and any other is an error.
        only=frozenset(
            (
                *("no_op", "replace_with_linear", "sparsify", "n_heads_in_group", "ffn_mult", "window_length"),
                *("num_sink_tokens", "use_prefill_window_in_sink_attention", "unshifted_sink"),
            )
        ),
    ),
    "llama.cpp's converter": Reader(
        "ggml-org/llama.cpp: convert_hf_to_gguf.py, DeciModel",
        {**COMMON, "rope_parameters": dict},
        {"replace_with_linear": FLAG, "n_heads_in_group": WHOLE},
        {"ffn_mult": float},
        none_means_absent=True,
    ),
    "exllamav3": Reader(
        "turboderp-org/exllamav3: exllamav3/architecture/decilm.py",
        {**COMMON, "head_dim": WHOLE},
        {"no_op": FLAG, "n_heads_in_group": WHOLE},
        {"no_op": FLAG, "ffn_mult": NUMBER},
    ),
}


def holds(value: Any, kind: Any) -> bool:
    """True where a JSON value is of a kind; true and false are no numbers."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def tensors_expected(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that the engines ask for, by their own reading of the config."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = hidden // heads
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for index, block in enumerate(config["block_configs"]):
        prefix = f"model.layers.{index}."
        if not block["attention"]["no_op"]:
            kv = heads // block["attention"]["n_heads_in_group"] * head_dim
            shapes[prefix + "input_layernorm.weight"] = (hidden,)
            for name, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
                shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows, hidden)
                if config["attention_bias"]:  # one switch for all four, in each engine that knows it
                    shapes[f"{prefix}self_attn.{name}_proj.bias"] = (rows,)
        if not block["ffn"]["no_op"]:
            asked = int(2 * block["ffn"]["ffn_mult"] * hidden / 3)
            width = asked if asked % 256 == 0 else asked + 256 - asked % 256
            shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
            shapes[prefix + "mlp.gate_proj.weight"] = shapes[prefix + "mlp.up_proj.weight"] = (width, hidden)
            shapes[prefix + "mlp.down_proj.weight"] = (hidden, width)
    return shapes


@pytest.mark.parametrize("name", PARENTS)
@pytest.mark.parametrize("engine", READERS)
def test_what_each_engine_reads(folders, engine, name):
    reader, config = READERS[engine], config_in(folders[name])
    assert config["model_type"] == "nemotron-nas" and config["architectures"] == ["DeciLMForCausalLM"]
    for key, kind in reader.top.items():
        assert holds(config[key], kind), f"{reader.source}: {key} = {config[key]!r}"
    assert len(config["block_configs"]) == config["num_hidden_layers"]
    assert not config["block_configs"][0]["attention"]["no_op"]
    for index, block in enumerate(config["block_configs"]):
        assert not (block["attention"]["no_op"] and block["ffn"]["no_op"])
        for part, keys, size in (("attention", reader.attention, "n_heads_in_group"), ("ffn", reader.ffn, "ffn_mult")):
            entry = block[part]
            assert not reader.only or set(entry) <= reader.only, f"{reader.source}: block {index} {part}"
            for key, kind in keys.items():
                if key == size and entry["no_op"]:
                    assert not reader.none_means_absent or entry[key] is None
                else:
                    assert holds(entry[key], kind), f"{reader.source}: block {index} {part} {key} = {entry[key]!r}"


@pytest.mark.parametrize("name", PARENTS)
def test_the_tensors_that_engines_ask_for(folders, name):
    checkpoint = open_checkpoint(str(folders[name]))
    assert {n: checkpoint.shape(n) for n in checkpoint} == tensors_expected(checkpoint.config)


def test_rotary_positions_under_old_and_new_keys(folders):
    plain, scaled = config_in(folders["llama"]), config_in(folders["llama-tied-scaled"])
    assert plain["rope_theta"] == plain["rope_parameters"]["rope_theta"] == 10000.0
    assert plain["rope_scaling"] is None  # "default" is no scaling that an engine knows
    assert scaled["rope_theta"] == scaled["rope_parameters"]["rope_theta"] == 5e5
    assert scaled["rope_parameters"] == LLAMA3_ROPE
    assert scaled["rope_scaling"] == {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}


def test_blocks_remember_the_layers_they_came_from(folders):
    """Beside the entries, where no engine minds it; read back into them."""
    config = config_in(folders["llama"])
    assert config["block_parents"] == [[0], [1, 2], [3], [4], [5]]
    assert [entry["parents"] for entry in normalised(config)["block_configs"]] == config["block_parents"]
    assert "block_parents" not in normalised(config)


def test_biases_that_qwen2_lacks_are_zeros(folders):
    checkpoint = open_checkpoint(str(folders["qwen2"]))
    added = [name for name in checkpoint if name.endswith("o_proj.bias")]
    attentions = [block for block in checkpoint.config["block_configs"] if not block["attention"]["no_op"]]
    assert len(added) == len(attentions) == 4 and not any(checkpoint[name].any() for name in added)
    assert checkpoint["model.layers.0.self_attn.q_proj.bias"].any()
    assert "TensorRT-LLM leaves out attention biases" in (folders["qwen2"] / "README.md").read_text()
    assert "TensorRT-LLM leaves out" not in (folders["mistral"] / "README.md").read_text()


@pytest.mark.parametrize("hidden", [32, 576, 2048, 4096, 5120, 8192, 16384])
def test_widths_survive_ffn_mult(hidden):
    """As computed from the float, and from the float of six digits that mlx-lm rounds it to."""
    for width in range(256, 65536 + 256, 256):
        mult = 3 * width / (2 * hidden)
        assert width_of(mult, hidden) == width_of(round(mult, 6), hidden) == width
        assert width_of(json.loads(json.dumps(mult)), hidden) == width
    assert [padded_width(w) for w in (1, 255, 256, 257, 1536)] == [256, 256, 256, 512, 1536]


@pytest.mark.parametrize("name", PARENTS)
def test_the_same_model(folders, name):
    """Padding, added biases and the other family change nothing."""
    tokens = some_tokens()
    surgeon, made = load_model(str(folders[f"surgeon-{name}"])), load_model(str(folders[name]))
    torch.testing.assert_close(logits(made, tokens), logits(surgeon, tokens), atol=1e-5, rtol=0)
    assert logits(surgeon, tokens).abs().max() > 0.1


def test_padded_channels_are_zeros_and_the_rest_is_copied(folders):
    wide, narrow = open_checkpoint(str(folders["llama"])), open_checkpoint(str(folders["surgeon-llama"]))
    name = "model.layers.3.mlp."
    for projection, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        padded, own = wide[f"{name}{projection}.weight"], narrow[f"{name}{projection}.weight"]
        assert (padded.shape[dim], own.shape[dim]) == (256, 200)
        assert torch.equal(padded.narrow(dim, 0, 200), own) and not padded.narrow(dim, 200, 56).any()


def test_operated_on_again(folders, tmp_path):
    """A nemotron-nas checkpoint is a Llama of blocks: what is cut from it is what is cut from the surgeon form."""
    steps = "\n  - {op: prune_attention, layers: [3]}\n  - {op: prune_blocks, layers: [2]}\n"
    tokens, made = some_tokens(), {}
    for label in ("qwen2", "surgeon-qwen2"):
        made[label] = run(recipe_of(steps), str(folders[label]), str(tmp_path / label), Options())
    assert made["qwen2"].planned.written.format == "nemotron-nas"
    assert config_in(made["qwen2"].out)["attention_bias"] is True
    a, b = (logits(load_model(str(outcome.out)), tokens) for outcome in made.values())
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


# What auto chooses, and what the form cannot hold.


def spec_of(family: str, *layers: LayerSpec) -> ModelSpec:
    return ModelSpec(family, 32, 64, layers, False, 128)


ATTENTION, FFN = AttentionSpec(4, 2, 8), FFNSpec(256)
BOTH, LONE_FFN, LONE_ATTENTION = LayerSpec(ATTENTION, FFN, (0,)), LayerSpec(None, FFN, (1,)), LayerSpec(ATTENTION, None)
MISFITS = {
    "no attention first": ((LONE_FFN, BOTH), {}, "block 0 has no attention"),
    "parallel": ((BOTH, LayerSpec(None, None, (1,), (BOTH, BOTH))), {}, "block 1 runs 2 blocks in parallel"),
    "empty": ((BOTH, LayerSpec(None, None, (1,))), {}, "block 1 has neither attention nor FFN"),
    "window": ((BOTH, LayerSpec(AttentionSpec(4, 2, 8, 16), FFNSpec(512), (1,))), {}, "block 1 has a sliding window"),
    "head width": ((BOTH, LayerSpec(AttentionSpec(4, 2, 16), FFN, (1,))), {}, "block 1 has 4 heads of width 16"),
    "heads": ((BOTH, LayerSpec(AttentionSpec(2, 2, 16), FFN, (1,))), {}, "block 1 has 2 heads of width 16"),
    "biases": ((BOTH, LONE_FFN), {"mlp_bias": True}, "leave out biases of the FFNs"),
    "activation": ((BOTH, LONE_FFN), {"hidden_act": "gelu"}, "know the activation silu alone, not gelu"),
}


@pytest.mark.parametrize("what", MISFITS)
def test_what_it_cannot_hold(what):
    layers, changes, message = MISFITS[what]
    layers = tuple(LayerSpec(b.attention, b.ffn, (i,), b.branches) for i, b in enumerate(layers))
    config = {**normalised(tiny_config("llama", num_hidden_layers=2)), **changes}
    with pytest.raises(SurgeryError, match=f"format nemotron-nas cannot hold this model: .*{message}.*that can: "):
        write_config(spec_of("llama", *layers), FAMILIES["llama"], config, "nemotron-nas")
    written = write_config(spec_of("llama", *layers), FAMILIES["llama"], config)
    assert written.format == "surgeon"
    assert "not nemotron-nas: " in written.why and re.search(message, written.why)


def test_other_families_are_told_why():
    config = normalised(tiny_config("qwen3", num_hidden_layers=2))
    with pytest.raises(
        SurgeryError, match=r"Llama-shaped models \(llama, mistral, qwen2\), not qwen3.*that can: .*surgeon"
    ):
        write_config(spec_of("qwen3", BOTH, LONE_FFN), FAMILIES["qwen3"], config, "nemotron-nas")


def test_auto():
    """Plain where it can be, nemotron-nas where engines read it, surgeon where zeros would outweigh that."""
    config = normalised(tiny_config("llama", num_hidden_layers=2))

    def chosen(*layers: LayerSpec) -> Any:
        return write_config(spec_of("llama", *layers), FAMILIES["llama"], config)

    assert chosen(BOTH, BOTH).format == "native"
    uneven = chosen(BOTH, LONE_FFN)
    assert (uneven.format, uneven.why) == ("nemotron-nas", "block 1 has no attention")
    padded = chosen(BOTH, LayerSpec(None, FFNSpec(200), (1,)))
    assert padded.format == "surgeon" and "multiples of 256 would add 12 % of zeros" in padded.why
    assert waste(spec_of("llama", BOTH, LayerSpec(None, FFNSpec(2040)))) is None
    assert chosen(BOTH, LayerSpec(ATTENTION, None, (1,))).loads.endswith("make no GGUF of it.")
    fewer = chosen(BOTH, LayerSpec(AttentionSpec(4, 1, 8), FFN, (1,)))
    assert fewer.format == "nemotron-nas" and "SGLang refuses it" in fewer.loads


# Checkpoints of others.


def published(**changes: Any) -> dict[str, Any]:
    """A config as NVIDIA publishes them, of few layers: 8 query heads, null where blocks differ, old rotary keys."""

    def block(group: int | None, mult: float | None, **more: Any) -> dict[str, Any]:
        attention = {"n_heads_in_group": group, "no_op": group is None, "num_sink_tokens": None, "sparsify": None}
        attention |= {"replace_with_linear": False, "unshifted_sink": False, "window_length": None, **more}
        ffn = {"ffn_mult": mult, "no_op": mult is None, "replace_with_linear": False, "sparsify": None}
        return {"attention": attention, "ffn": ffn}

    config = {
        "architectures": ["DeciLMForCausalLM"],
        "attention_bias": False,
        "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
        "block_configs": [block(4, 2.625), block(None, 1.3125), block(None, None), block(8, 5.25), block(4, None)],
        "bos_token_id": 1,
        "eos_token_id": [1, 2],
        "hidden_act": "silu",
        "hidden_size": 512,
        "intermediate_size": None,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "nemotron-nas",
        "num_attention_heads": 8,
        "num_hidden_layers": 5,
        "num_key_value_heads": None,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"},
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 256,
    }
    return {**config, **changes}


@pytest.fixture
def config_file(tmp_path) -> Any:
    def write(config: dict[str, Any]) -> str:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path / "config.json")

    return write


def test_published_configs_are_read(config_file):
    parent = open_config(config_file(published()))
    layers = parent.spec.layers
    assert parent.family.model_type == "llama" and parent.dtype == torch.bfloat16
    assert [b.attention and (b.attention.heads, b.attention.kv_heads) for b in layers] == [
        (8, 2),
        None,
        None,
        (8, 1),
        (8, 2),
    ]
    assert [b.ffn and b.ffn.width for b in layers] == [1024, 512, None, 1792, None]
    assert layers[2].empty
    assert parent.config["rope_parameters"] == LLAMA3_ROPE


def test_published_configs_are_operated_on(config_file):
    """Blocks that only pass their input on are left out of what is written; layers keep their numbers."""
    parent = open_config(config_file(published()))
    made = plan(parent, recipe_of("\n  - {op: prune_attention, layers: [3]}\n"), {})
    assert made.written.format == "nemotron-nas" and len(made.written.config["block_configs"]) == 4
    assert [layer.parents for layer in made.spec.layers] == [(0,), (1,), (3,), (4,)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"replace_with_linear": True}, r"block_configs\[1\] has replace_with_linear: True, which is known and not"),
        ({"window_length": 512}, r"block_configs\[1\] has window_length: 512"),
        ({"llama4": {"chunk": 1}}, r"block_configs\[1\] has llama4: .* which is not known here"),
    ],
)
def test_blocks_that_this_tool_has_no_word_for(change, message):
    config = published()
    config["block_configs"][1]["attention"] |= change
    with pytest.raises(SurgeryError, match=message):
        read(config)


@pytest.mark.parametrize(
    "value", [None, [], [{}], [{"attention": {"no_op": False, "n_heads_in_group": 0}, "ffn": {}}], "x"]
)
def test_block_configs_that_lie(config_file, value):
    with pytest.raises(SurgeryError, match="block_configs"):
        open_config(config_file(published(block_configs=value)))


def test_more_entries_than_layers(config_file):
    with pytest.raises(SurgeryError, match="block_configs has 5 entries, num_hidden_layers says 7"):
        open_config(config_file(published(num_hidden_layers=7)))


def test_the_streamed_weights_are_those_in_memory(folders):
    """Padding computed block by block on disk equals the transforms over a state dict."""
    subject, weights, config = subject_of(tiny_model("llama", **WIDE))
    for step in recipe_of(STEPS).steps:
        made = step.resolve(subject).plan(subject)
        weights, subject = TransformedWeights(weights, made.transforms), subject.after(made)
    written = write_config(subject.spec, subject.family, config, "nemotron-nas")
    fitted, streamed = written.fit(weights), open_checkpoint(str(folders["llama"]))
    assert set(fitted) == set(streamed)
    assert all(torch.equal(fitted[name], streamed[name]) for name in streamed)
