"""Each family's declaration against the class that transformers builds."""

from __future__ import annotations

import pytest
import torch
from conftest import LAYERS, tiny_config, tiny_model
from operations.helpers import VARIANTS, logits, naive, some_tokens

from llmsurgeon.errors import SurgeryError
from llmsurgeon.families import FAMILIES, family_of
from llmsurgeon.formats.models import normalised


def test_declared_paths_name_the_modules_of_the_model(family_name):
    family, model = FAMILIES[family_name], tiny_model(family_name)
    assert type(model).__name__ == family.model_class
    assert model.get_submodule(family.embedding) is model.get_input_embeddings()
    assert model.get_submodule(family.head) is model.get_output_embeddings()
    model.get_submodule(family.final_norm)
    layers = model.get_submodule(family.layers)
    assert len(layers) == LAYERS
    for name in (*family.ffn_in, family.ffn_out):
        assert family.layer(0) + family.ffn_tensor(name) in model.state_dict()
    layers[0].get_submodule(f"{family.attention}.{family.attention_out}")
    for name in family.kv:
        layers[0].get_submodule(f"{family.attention}.{name}")


def test_every_tensor_of_a_layer_is_attention_or_ffn_and_not_both(family_name):
    family, model = FAMILIES[family_name], tiny_model(family_name)
    for name in model.get_submodule(family.layers)[0].state_dict():
        assert family.is_attention(name) != family.is_ffn(name), name


@pytest.mark.parametrize(("family_name", "changes"), VARIANTS)
def test_a_layer_is_its_attention_and_its_ffn(family_name, changes):
    """The declared modules and the residual order reproduce transformers' own layer."""
    model = tiny_model(family_name, **changes)
    side_by_side = FAMILIES[family_name].parallel_residual(model.config.to_dict())
    assert side_by_side is (family_name == "gpt_neox" and not changes)

    def layer(index):
        def compute(x, parts):
            attended = x + parts.attention(index, x)
            return attended + parts.ffn(index, x if side_by_side else attended)

        return compute

    tokens = some_tokens()
    expected = logits(model, tokens)
    torch.testing.assert_close(logits(naive(model, {i: layer(i) for i in range(LAYERS)}), tokens), expected)


def test_describe(family_name):
    config = normalised(tiny_config(family_name))
    spec = FAMILIES[family_name].describe(config)
    assert (spec.family, spec.hidden, spec.vocab, len(spec.blocks)) == (family_name, 32, 64, LAYERS)
    assert spec.uniform
    assert [block.parents for block in spec.blocks] == [(i,) for i in range(LAYERS)]
    block = spec.blocks[0]
    assert block.ffn.width == (128 if family_name == "gpt2" else 96)
    assert block.attention.heads == 4
    assert block.attention.kv_heads == (4 if family_name in ("gpt2", "gpt_neox") else 2)
    assert block.attention.head_dim == (16 if family_name == "qwen3" else 8)


@pytest.mark.parametrize(
    ("family", "changes", "windows"),
    [
        ("llama", {}, [None] * 6),
        ("mistral", {}, [8] * 6),
        ("mistral", {"sliding_window": None}, [None] * 6),
        ("qwen2", {}, [None] * 3 + [8] * 3),
        ("qwen2", {"use_sliding_window": False}, [None] * 6),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 5}, [None] * 5 + [4]),
    ],
)
def test_sliding_windows(family, changes, windows):
    spec = FAMILIES[family].describe(normalised(tiny_config(family, **changes)))
    assert [block.attention.window for block in spec.blocks] == windows


def test_tied_embeddings_are_seen():
    assert FAMILIES["llama"].describe(normalised(tiny_config("llama", tie_word_embeddings=True))).tied
    assert not FAMILIES["llama"].describe(normalised(tiny_config("llama", tie_word_embeddings=False))).tied


@pytest.mark.parametrize("value", [0, -1, None, "6", 2.0, True])
def test_sizes_must_be_positive_numbers(value):
    config = {**normalised(tiny_config("llama")), "num_hidden_layers": value}
    with pytest.raises(SurgeryError, match="num_hidden_layers must be a positive whole number"):
        FAMILIES["llama"].describe(config)


def test_per_layer_lists_must_fit():
    config = {**normalised(tiny_config("qwen2")), "layer_types": ["full_attention"] * 5}
    with pytest.raises(SurgeryError, match="layer_types has 5 entries, num_hidden_layers says 6"):
        FAMILIES["qwen2"].describe(config)
    config = {**normalised(tiny_config("llama")), "block_configs": [{}]}
    with pytest.raises(SurgeryError, match="block_configs has 1 entries, num_hidden_layers says 6"):
        FAMILIES["llama"].describe(config)


@pytest.mark.parametrize("key", ["scale_attn_by_inverse_layer_idx", "add_cross_attention"])
def test_settings_that_cannot_be_operated_on_are_refused(key):
    with pytest.raises(SurgeryError, match=f"gpt2 with {key}=True cannot be operated on"):
        FAMILIES["gpt2"].describe(normalised(tiny_config("gpt2", **{key: True})))


def test_an_unsupported_family_lists_the_supported_ones():
    with pytest.raises(SurgeryError, match=r"'gemma2' is not supported; supported are llama, .*adding-a-family"):
        family_of({"model_type": "gemma2"})
    with pytest.raises(SurgeryError, match="None is not supported"):
        family_of({})


def test_a_converted_checkpoint_belongs_to_its_family(family_name):
    assert family_of({"model_type": f"surgeon_{family_name}"}) is FAMILIES[family_name]
