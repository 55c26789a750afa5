"""The config class that engines read: attributes and keys, old and new rotary settings, null in the file."""

from __future__ import annotations

import copy
import json
import pickle
import sys
import tomllib
import types
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llmsurgeon.formats.bitnet import packed
from llmsurgeon.formats.caches import cached_call
from llmsurgeon.formats.nemotron_nas import ATTENTION_KEYS, FFN_KEYS, width_of
from llmsurgeon.modeling.configuration_decilm import DeciLMConfig, sizes_of
from llmsurgeon.modeling.modeling_decilm import DeciLMForCausalLM
from llmsurgeon.plugins.vllm import register
from llmsurgeon.plugins.vllm_families import FAMILIES
from llmsurgeon.run import Options, run

with warnings.catch_warnings():  # importing torch's compiler warns of torch's own doings
    warnings.simplefilter("ignore")
    from transformers.integrations.bitnet import AutoBitLinear

ROPE = {"rope_type": "linear", "factor": 2.0}


def entry(group: int | None, mult: float | None) -> dict[str, Any]:
    attention = {**ATTENTION_KEYS, "no_op": group is None, "n_heads_in_group": group}
    return {"attention": attention, "ffn": {**FFN_KEYS, "no_op": mult is None, "ffn_mult": mult}}


ENTRIES = [entry(2, 12.0), entry(None, 24.0), entry(4, None)]  # 4 heads, hidden 32: widths 256 and 512
SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "rope_theta": 5e5,
    "rope_scaling": ROPE,
    "intermediate_size": None,
    "num_key_value_heads": None,
}


def config(**changes: Any) -> DeciLMConfig:
    # Copied: transformers adds to what it is given.
    return DeciLMConfig(**copy.deepcopy({"block_configs": ENTRIES, **SIZES, **changes}))


def test_blocks_by_attribute_and_by_key():
    blocks = config().block_configs
    assert blocks[0].attention.n_heads_in_group == blocks[0]["attention"]["n_heads_in_group"] == 2
    assert blocks[1].attention.no_op and blocks[2].ffn.no_op and blocks[2].ffn.ffn_mult is None
    assert not hasattr(blocks[0].ffn, "hidden_act") and isinstance(blocks[0], dict)
    again = pickle.loads(pickle.dumps(config())).block_configs
    assert again == blocks == copy.deepcopy(blocks) and again[0].ffn.ffn_mult == 12.0


def test_sizes_for_the_whole_model_are_the_largest():
    made = config()
    assert (made.intermediate_size, made.num_key_value_heads) == (512, 2)
    assert made.sizes() == [(2, 256), (None, 512), (1, None)]
    for hidden in (576, 4096):
        for mult in (1.95, 2.625, 5.25, 3 * 1536 / (2 * 576)):
            assert sizes_of(entry(1, mult), 8, hidden) == (8, width_of(mult, hidden))


def test_rotary_settings_where_old_and_new_engines_look():
    made = config()
    assert made.rope_theta == made.rope_parameters["rope_theta"] == 5e5
    assert made.rope_scaling == ROPE and made.rope_parameters["factor"] == 2.0
    plain = config(rope_scaling=None)
    assert plain.rope_scaling is None and plain.rope_parameters["rope_type"] == "default"


def test_the_file_and_back(tmp_path):
    made = config()
    made.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["intermediate_size"] is None and values["num_key_value_heads"] is None
    assert values["block_configs"] == ENTRIES
    assert (values["rope_theta"], values["rope_scaling"]) == (5e5, ROPE)
    again = DeciLMConfig.from_pretrained(tmp_path)
    assert again.to_dict() == made.to_dict()
    assert DeciLMConfig.from_dict(made.to_dict()).to_json_string() == made.to_json_string()


def test_a_stock_class_named_by_hand_raises(tmp_path):
    config().save_pretrained(tmp_path)
    for stock in (LlamaConfig, LlamaForCausalLM):
        with pytest.raises(StrictDataclassFieldValidationError, match="intermediate_size"):
            stock.from_pretrained(tmp_path)


def test_caches_have_a_slot_for_each_attention():
    made = config()
    assert made.get_text_config() is made
    assert made.get_text_config(decoder=True).num_hidden_layers == 2
    model = DeciLMForCausalLM(made).eval()
    _, cache = cached_call(model, input_ids=torch.arange(8)[None])
    assert [layer.get_seq_length() for layer in cache.layers] == [8, 8]
    assert not hasattr(model.model.layers[1], "self_attn") and not hasattr(model.model.layers[2], "mlp")
    whole = config(block_configs=[entry(2, 12.0)] * 3)
    assert whole.get_text_config(decoder=True) is whole


def test_what_engines_write_into_it():
    made = config()
    made.num_key_value_heads = [2, 0, 1]  # one number per layer
    assert made.num_key_value_heads == [2, 0, 1]


def test_entries_that_do_not_fit():
    with pytest.raises(ValueError, match="block_configs has 3 entries"):
        config(num_hidden_layers=4)
    linear = copy.deepcopy(ENTRIES)
    linear[1]["attention"]["replace_with_linear"] = True
    with pytest.raises(ValueError, match=r"block_configs\[1\]: replace_with_linear is not supported"):
        DeciLMForCausalLM(config(block_configs=linear))


def test_it_needs_transformers_alone():
    """Engines load the config class without torch code, on transformers 4 and 5."""
    source = (files("llmsurgeon") / "modeling" / "configuration_decilm.py").read_text()
    imported = [line for line in source.splitlines() if line.lstrip().startswith(("import ", "from "))]
    assert {line.split()[1].split(".")[0] for line in imported} == {
        *("copy", "json", "dataclasses"),
        *("transformers", "huggingface_hub"),
    }


LINEAR = ("LinearBase", "LinearMethodBase", "UnquantizedLinearMethod")


@pytest.fixture
def vllm(monkeypatch):
    """What the plugin asks of vLLM, which is not installed here (tests/engines/ runs the real one); registries as they
    were, afterwards."""
    made = types.ModuleType("vllm")
    made.__version__ = "0.32.1"
    made.models = {}
    made.ModelRegistry = types.SimpleNamespace(register_model=made.models.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", made)
    made.quantizations = {}

    def registered(name):
        return lambda kind: made.quantizations.setdefault(name, kind)

    class QuantizationConfig:
        def __init__(self):
            self.packed_modules_mapping = {}

    layers = "vllm.model_executor.layers"
    inner = {
        f"{layers}.linear": {name: type(name, (), {}) for name in LINEAR},
        f"{layers}.quantization": {"register_quantization_config": registered},
        f"{layers}.quantization.base_config": {"QuantizationConfig": QuantizationConfig, "QuantizeMethodBase": object},
        "vllm.model_executor.utils": {"set_weight_attrs": lambda tensor, attributes: vars(tensor).update(attributes)},
    }
    for name, content in inner.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "llmsurgeon.plugins.vllm_bitnet", raising=False)
    yield made
    sys.modules.pop("llmsurgeon.plugins.vllm_bitnet", None)
    for name in ("nemotron-nas", *(family.model_type for family in FAMILIES)):
        CONFIG_MAPPING._extra_content.pop(name, None)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_vllm_plugin_reads_surgeon_configs(family, tmp_path, vllm, caplog):
    parent = save_tiny(tmp_path / "parent", family.name)
    (tmp_path / "cut.yaml").write_text("version: 1\nformat: surgeon\nsteps: [{op: prune_attention, layers: [0]}]\n")
    run(tmp_path / "cut.yaml", str(parent), tmp_path / "out", Options())
    register()
    (architecture,) = json.loads((tmp_path / "out" / "config.json").read_text())["architectures"]
    assert vllm.models[architecture] == f"llmsurgeon.plugins.vllm_models:{architecture}"
    made = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=False)
    first, second = made.block_configs[:2]
    assert first.attention.no_op and not second.attention.no_op and second.attention.kind is None
    assert second.ffn.intermediate_size == second["ffn"]["intermediate_size"] and isinstance(made.hidden_size, int)
    # vLLM hands it to other processes.
    again = pickle.loads(pickle.dumps(made))
    assert type(again) is type(made) and again.block_configs[0].attention.no_op
    assert caplog.records == []


def eagerly(module, read):
    """What a module gives without the compiler, which is slow and changes no number."""
    torch.compiler.set_stance("force_eager")
    try:
        return module(read)
    finally:
        torch.compiler.set_stance("default")


@pytest.mark.parametrize("linear_class", ["autobitlinear", "bitlinear"])
def test_the_vllm_plugin_computes_packed_linears_as_transformers_does(vllm, linear_class):
    """Two ternary linears that vLLM has stacked in one, each packed with a scale of its own."""
    register()
    config = vllm.quantizations["bitnet"].from_config({"quant_method": "bitnet", "linear_class": linear_class})
    config.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    linear = sys.modules["vllm.model_executor.layers.linear"].LinearBase()
    method = config.get_quant_method(linear, "model.layers.0.mlp.gate_up_proj")
    layer, codes = nn.Module(), [torch.randint(-1, 2, (8, 16)).float() for _ in range(2)]

    def place(param, whole, shard):
        param.data[8 * shard : 8 * shard + 8] = whole

    method.create_weights(layer, 16, [8, 8], 16, 16, torch.float32, weight_loader=place)
    read, expected = torch.randn(5, 16), []
    for shard, (each, scale) in enumerate(zip(codes, (0.02, 0.5), strict=True)):
        bits, stored = packed("w", linear_class, each * scale)
        layer.weight.weight_loader(layer.weight, bits, shard)
        layer.weight_scale.weight_loader(layer.weight_scale, stored, shard)
        theirs = AutoBitLinear(16, 8, bias=False)
        theirs.weight.data, theirs.weight_scale = each, torch.tensor([scale])
        expected.append(eagerly(theirs, read))
    method.process_weights_after_loading(layer)
    torch.testing.assert_close(method.apply(layer, read), torch.cat(expected, -1), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="run on one rank"):
        method.create_weights(nn.Module(), 8, [8], 16, 8, torch.float32, weight_loader=place)


def test_the_vllm_plugin_leaves_plain_linears_alone(vllm):
    register()
    kind, linears = vllm.quantizations["bitnet"], sys.modules["vllm.model_executor.layers.linear"]
    kept = ["lm_head", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp"]
    config = kind.from_config({"modules_to_not_convert": kept})
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj"]}
    plain = config.get_quant_method(linears.LinearBase(), "model.layers.1.mlp.down_proj")
    assert isinstance(plain, linears.UnquantizedLinearMethod)
    assert config.get_quant_method(object(), "model.embed_tokens") is None
    with pytest.raises(ValueError, match=r"here model.layers.0.self_attn.k_proj is packed and .*q_proj is not"):
        config.get_quant_method(linears.LinearBase(), "model.layers.0.self_attn.qkv_proj")
    for odd in ({"quantization_mode": "online"}, {"use_rms_norm": True}):
        with pytest.raises(ValueError, match="are not read"):
            kind.from_config(odd)


def test_the_vllm_plugin_says_what_it_was_tested_with(vllm, caplog):
    vllm.__version__ = "0.40.0"
    register()
    assert "was tested with vLLM 0.32, and this is 0.40.0" in caplog.text


def test_the_vllm_plugin(tmp_path, vllm):
    """vLLM itself is not at hand: what can be held is that its entry point makes the config load without trust."""
    config(auto_map={"AutoConfig": "configuration_decilm.DeciLMConfig"}).save_pretrained(tmp_path)
    register()
    register()  # vLLM calls it in each process, and may call it twice
    for trust in (None, False, True):
        made = AutoConfig.from_pretrained(tmp_path, trust_remote_code=trust)
        assert type(made) is DeciLMConfig and made.block_configs[1].attention.no_op


def test_the_entry_point_is_declared():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"llmsurgeon": "llmsurgeon.plugins.vllm:register"}
