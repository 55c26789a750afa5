"""What the code leans on that its authors may move: docs/dependencies.md lists it, and each of it is held here.

A test that fails says what has moved; the page says who uses it.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, tiny_model
from torch import nn

import llmsurgeon

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "dependencies.md").read_text()
SOURCES = sorted(Path(llmsurgeon.__file__).parent.rglob("*.py"))
# Modules below a library's own front door, and the names taken from them. `models.*` of transformers are its families.
INNER = {
    "transformers.activations": ["ACT2FN"],
    "transformers.cache_utils": ["Cache", "CacheLayerMixin", "DynamicCache", "DynamicLayer"],
    "transformers.initialization": ["no_init_weights"],
    "transformers.masking_utils": ["create_causal_mask"],
    "transformers.modeling_layers": ["GradientCheckpointingLayer"],
    "transformers.modeling_outputs": [
        "BaseModelOutputWithPast",
        "BaseModelOutputWithPoolingAndCrossAttentions",
        "CausalLMOutputWithPast",
    ],
    "transformers.pytorch_utils": ["Conv1D"],
    "transformers.utils": ["can_return_tuple", "logging"],
    "huggingface_hub.dataclasses": ["strict"],
    "huggingface_hub.errors": ["LocalTokenNotFoundError", "RepositoryNotFoundError"],
    "huggingface_hub.utils": [
        "HFValidationError",
        "are_progress_bars_disabled",
        "disable_progress_bars",
        "enable_progress_bars",
        "validate_repo_id",
    ],
    "accelerate.state": ["AcceleratorState", "GradientState"],
    "accelerate.tracking": ["get_available_trackers"],
    "gguf.quants": ["dequantize", "quantize"],
    "peft.tuners.lora": ["LoraLayer"],
    "safetensors.torch": ["load_file", "save", "save_file"],
}
# Attributes with an underscore that are not ours: name -> whose.
PRIVATE = {
    "_forward_hooks": "torch.nn.Module",
    "_forward_pre_hooks": "torch.nn.Module",
    "_is_hf_initialized": "transformers, of parameters that a file gave",
    "_parameters": "torch.nn.Module",
    "_init_weights": "transformers.PreTrainedModel",
    "_reset_state": "accelerate.state.AcceleratorState and GradientState",
    "_run_exitfuncs": "atexit",
}
LIBRARIES = tuple({name.partition(".")[0] for name in INNER})


def trees():
    return [(path, ast.parse(path.read_text())) for path in SOURCES]


def test_the_list_is_whole():
    """No import from below a front door that is not listed, and nothing listed that nobody imports."""
    found: dict[str, set[str]] = {}
    for _, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(LIBRARIES):
                inner = "." in node.module and not node.module.startswith("transformers.models.")
                if inner:
                    found.setdefault(node.module, set()).update(alias.name for alias in node.names)
    found["huggingface_hub.dataclasses"] = {"strict"}  # imported as a module, too
    assert {module: sorted(names) for module, names in found.items()} == INNER


@pytest.mark.parametrize("module", INNER)
def test_what_is_imported_is_there_and_on_the_page(module):
    for name in INNER[module]:
        assert hasattr(importlib.import_module(module), name), f"{module}.{name} has moved"
        assert f"`{name}`" in PAGE, f"docs/dependencies.md does not list {name} of {module}"


def test_private_attributes_are_listed():
    """Every underscore that is read of something else than self, and that no file of ours defines."""
    used, ours = set(), set()
    for _, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                ours.add(node.name)
            elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                mine = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                (ours if mine else used).add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                ours.add(node.id)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                ours.add(node.target.id)
    # What our own classes define is theirs only where a library's class does not have it first.
    documented = {"_exit"}  # os
    foreign = {name for name in used - documented if name not in ours or name in PRIVATE}
    assert foreign == set(PRIVATE), f"list in PRIVATE and on the page: {sorted(foreign ^ set(PRIVATE))}"
    for name in PRIVATE:
        assert f"`{name}`" in PAGE


def test_hooks_of_modules_can_be_passed_on():
    module, other = nn.Linear(2, 2), nn.Linear(2, 2)
    module.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0,))
    other._forward_pre_hooks = module._forward_pre_hooks
    assert torch.equal(other(torch.ones(2)), other.bias) and set(module._parameters) == {"weight", "bias"}


def test_buffers_without_a_file_are_made_by_the_model():
    """empty_model: parameters on meta, no initialisation, `_init_weights` for a module's own buffers."""
    from transformers.initialization import no_init_weights

    model = tiny_model("llama")
    assert list(inspect.signature(model._init_weights).parameters) == ["module"]
    with torch.device("meta"), no_init_weights():
        made = type(model)(model.config)
    assert all(parameter.is_meta for parameter in made.parameters())
    assert type(made.model.rotary_emb)(made.config).inv_freq.device.type == "cpu"


def test_weights_that_a_file_gave_are_marked():
    """`_init_weights` of ours leaves them as they are; what no file gave is made by the rules of the library."""
    from transformers import initialization

    linear = nn.Linear(2, 2)
    linear.weight._is_hf_initialized = True
    before = linear.weight.clone()
    for parameter in linear.parameters():
        initialization.zeros_(parameter)
    assert torch.equal(linear.weight, before) and not linear.bias.any()


def test_tied_names_are_known():
    tied = tiny_model("llama", tie_word_embeddings=True)
    assert list(tied.all_tied_weights_keys) == ["lm_head.weight"] and tied.base_model_prefix == "model"


def test_caches_are_made_by_layer_type():
    """Of the text config that get_text_config(decoder=True) gives, by tables that a type of ours is added to."""
    from transformers import DynamicCache, cache_utils

    from llmsurgeon.modeling.surgeon_mlgru import CACHE_TYPE, MLGRUState

    asked = []
    config = tiny_model("llama").config
    view = type(config)(**{**config.to_dict(), "num_hidden_layers": 2})
    view.layer_types = [CACHE_TYPE, "full_attention"]

    def text_config(self, decoder=None, encoder=None):
        asked.append(decoder)
        return view

    config.__class__ = type("Viewed", (type(config),), {"get_text_config": text_config})
    cache = DynamicCache(config=config)
    assert asked[-1] is True
    # By name: a checkpoint that another test has loaded brought its own file, whose class came last.
    assert [type(layer).__name__ for layer in cache.layers] == [MLGRUState.__name__, cache_utils.DynamicLayer.__name__]
    for table in (cache_utils.DYNAMIC_LAYER_TYPE_MAPPING, cache_utils.STATIC_LAYER_TYPE_MAPPING):
        assert CACHE_TYPE in table and "full_attention" in table
    assert issubclass(MLGRUState, cache_utils.LinearAttentionCacheLayerMixin)


def test_what_a_cache_layer_is():
    """MLGRUState, BlockLayer and RoomyLayer stand in for it: what is called of one, and what a DynamicLayer keeps."""
    from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

    from llmsurgeon.modeling.surgeon_block_transformer import BlockLayer
    from llmsurgeon.modeling.surgeon_mlgru import MLGRUState

    assert CacheLayerMixin.__abstractmethods__ <= set(dir(MLGRUState)) and not MLGRUState.__abstractmethods__
    layer = BlockLayer()
    keys = torch.ones(1, 2, 3, 4)
    layer.update(keys, keys)
    assert isinstance(layer, DynamicLayer) and layer.is_initialized and layer.get_seq_length() == 3
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.update(keys, keys)[0].shape == keys.shape
    cache = Cache(layers=[layer, BlockLayer()])
    assert cache.get_seq_length() == 3 and cache.layers[0] is layer
    for name in ("reset", "reorder_cache", "batch_repeat_interleave", "batch_select_indices", "crop"):
        assert callable(getattr(Cache, name))


def test_names_of_caches_and_masks():
    from llmsurgeon.formats.caches import NAMES
    from llmsurgeon.modeling import surgeon_versions as versions

    assert versions.OUTPUT_CACHE in NAMES and versions.MASK_CACHE in NAMES
    assert {"config", "attention_mask"} < versions.MASK_ARGUMENTS
    assert len({"inputs_embeds", "input_embeds"} & versions.MASK_ARGUMENTS) == 1
    unknown = versions.MASK_ARGUMENTS - {
        *("config", "attention_mask", "inputs_embeds", "input_embeds", "position_ids", versions.MASK_CACHE),
        *("or_mask_function", "and_mask_function", "block_sequence_ids", "layer_idx", "allow_is_causal_skip"),
        "cache_position",
    }
    assert not unknown, f"create_causal_mask has new arguments: read what they mean, {sorted(unknown)}"


def test_generation_asks_before_it_makes_a_cache():
    """A block transformer makes its own: generate leaves it to the model."""
    from transformers.generation import GenerationMixin

    assert isinstance(inspect.getattr_static(GenerationMixin, "_supports_default_dynamic_cache"), classmethod)


def test_layers_are_called_with_arguments_that_are_known():
    """transformers' own keyword arguments of a forward pass: a new one has to be understood or refused on purpose."""
    from transformers.utils import TransformersKwargs

    from llmsurgeon.modeling.surgeon_versions import IGNORED, UNDERSTOOD

    unknown = set(TransformersKwargs.__annotations__) - UNDERSTOOD - IGNORED
    assert not unknown, f"new arguments: {sorted(unknown)}; see surgeon_versions.UNDERSTOOD"


def test_a_stock_config_class_refuses_a_text_for_a_size():
    """So does a stock model class named by hand on a converted checkpoint, instead of making weights up."""
    from transformers import LlamaConfig

    with pytest.raises(Exception, match="intermediate_size"):
        LlamaConfig(intermediate_size="see block_configs")


def test_code_in_checkpoints_is_found_by_its_imports():
    from transformers.dynamic_module_utils import get_relative_import_files

    file = Path(llmsurgeon.__file__).parent / "modeling" / "modeling_surgeon_llama.py"
    found = {Path(path).name for path in get_relative_import_files(file)}
    assert {"surgeon_blocks.py", "surgeon_fff_numba.py", "surgeon_versions.py"} <= found


def test_published_names_of_a_type_can_be_given_to_another():
    from transformers import conversion_mapping

    for name in ("get_checkpoint_conversion_mapping", "register_checkpoint_conversion_mapping"):
        assert callable(getattr(conversion_mapping, name))
    assert conversion_mapping.get_checkpoint_conversion_mapping("mixtral")


def test_rotary_parameters_have_one_place():
    """rope_parameters with base and kind, filled in from the old keys."""
    from transformers import LlamaConfig

    made = LlamaConfig(rope_theta=5.0, rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert made.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0}
    assert tiny_config("gemma3_text")["rope_parameters"].keys() == {"full_attention", "sliding_attention"}


def test_accelerate_forgets_its_state():
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state()
    GradientState._reset_state()
    assert not AcceleratorState._shared_state and not GradientState._shared_state


def test_gguf_knows_architectures_and_types():
    import gguf

    assert gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA] == "llama"
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    assert names.get_name("model.layers.1.mlp.up_proj") == "blk.1.ffn_up"
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_0] == (32, 34)
    rows = torch.randn(2, 64).numpy()
    packed = gguf.quants.quantize(rows, gguf.GGMLQuantizationType.Q8_0)
    assert abs(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0) - rows).max() < 0.02
    assert gguf.LlamaFileType.MOSTLY_Q8_0 and gguf.GGUFValueType.STRING and gguf.GGML_QUANT_VERSION == 2
    for name in ("add_tensor_info", "write_header_to_file", "write_kv_data_to_file", "write_ti_data_to_file"):
        assert callable(getattr(gguf.GGUFWriter, name))


def test_low_rank_adapters_know_their_base():
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    model = nn.Sequential(nn.Linear(4, 4))
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), model)
    assert isinstance(model[0], LoraLayer) and isinstance(model[0].get_base_layer(), nn.Linear)


def test_temporary_files_go_where_a_process_ends_at_once():
    import atexit

    assert callable(atexit._run_exitfuncs)


def test_torch_has_the_types_that_files_hold():
    from llmsurgeon.checkpoint.safetensors_file import DTYPES

    assert DTYPES["F8_E8M0"] is torch.float8_e8m0fnu, "torch before 2.7 has none"
