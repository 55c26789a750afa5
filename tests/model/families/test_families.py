"""Each family's declaration against the class that transformers builds."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import LAYERS, tiny_config, tiny_model
from operations.helpers import (
    FALCON_2,
    FALCON_7B,
    VARIANTS,
    declared,
    logits,
    naive,
    norm_of_ffn,
    operate,
    some_tokens,
    subject_of,
)

from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats.configs import normalised
from llmsurgeon.model.families import FAMILIES, family_of
from llmsurgeon.operations import OPERATIONS
from llmsurgeon.operations.fuse_ffn import FuseFFN
from llmsurgeon.operations.parallel_blocks import ParallelBlocks
from llmsurgeon.operations.prune_kv_heads import PruneKVHeads

# Attention and FFN read one input.
SIDE_BY_SIDE: list[tuple[str, dict]] = [
    ("gpt_neox", {}),
    ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    ("falcon", {}),
    ("falcon", FALCON_7B),
    ("falcon", FALCON_2),
]
# Steps that some families decline.
STEPS = {
    "fuse_ffn": FuseFFN(runs=((2, 3),)),
    "parallel_blocks": ParallelBlocks(windows=((1, 2),)),
    "prune_kv_heads": PruneKVHeads(kv_heads=1),
}
DECLINED = [
    (name, changes, operation)
    for name, changes in VARIANTS
    for operation in OPERATIONS
    if OPERATIONS[operation].declined(declared(name, changes))
]


@pytest.mark.parametrize(("family_name", "changes"), VARIANTS)
def test_declared_paths_name_the_modules_of_the_model(family_name, changes):
    family, model = declared(family_name, changes), tiny_model(family_name, **changes)
    assert type(model).__name__ == family.model_class
    assert model.get_submodule(family.embedding) is model.get_input_embeddings()
    assert model.get_submodule(family.head) is model.get_output_embeddings()
    model.get_submodule(family.final_norm)
    layers = model.get_submodule(family.layers)
    assert len(layers) == LAYERS
    for name in (*family.ffn_in, family.ffn_out):
        assert family.layer(0) + family.ffn_tensor(name) in model.state_dict()
    attention = getattr(layers[0], family.attention)
    for name in (family.attention_out, *family.kv, *(family.fused_qkv or ())[:1]):
        attention.get_submodule(name)
    for norm in (family.attention_norm, norm_of_ffn(family), family.attention_post_norm, family.ffn_post_norm):
        assert not norm or isinstance(getattr(layers[0], norm), torch.nn.Module)


@pytest.mark.parametrize(("family_name", "changes"), VARIANTS)
def test_every_tensor_of_a_layer_is_attention_or_ffn_and_not_both(family_name, changes):
    family, model = declared(family_name, changes), tiny_model(family_name, **changes)
    for name in model.get_submodule(family.layers)[0].state_dict():
        assert family.is_attention(name) != family.is_ffn(name), name
        # A norm that both read counts as attention's.
        assert not (family.shares_norm and family.is_ffn(name) and "norm" in name)


@pytest.mark.parametrize(("family_name", "changes"), VARIANTS)
def test_a_layer_is_its_attention_and_its_ffn(family_name, changes):
    """The declared modules and the residual order reproduce transformers' own layer."""
    model = tiny_model(family_name, **changes)
    side_by_side = declared(family_name, changes).parallel_residual(model.config.to_dict())
    assert side_by_side is ((family_name, changes) in SIDE_BY_SIDE)

    def layer(index):
        def compute(x, parts):
            attended = x + parts.attention(index, x)
            return attended + parts.ffn(index, x if side_by_side else attended)

        return compute

    tokens = some_tokens()
    expected = logits(model, tokens)
    torch.testing.assert_close(logits(naive(model, {i: layer(i) for i in range(LAYERS)}), tokens), expected)


# (FFN width, key/value heads, head width) of the tiny families, where they are not those of most.
SIZES = {
    "gpt2": (128, 4, 8),
    "gpt_neox": (96, 4, 8),
    "bloom": (128, 4, 8),
    "opt": (96, 4, 8),
    "qwen3": (96, 2, 16),
    "gemma2": (96, 2, 16),
    "gemma3_text": (96, 2, 16),
}


def test_describe(family_name):
    config = normalised(tiny_config(family_name))
    spec = family_of(config).describe(config)
    assert (spec.family, spec.hidden, spec.vocab, len(spec.layers)) == (family_name, 32, 64, LAYERS)
    assert spec.uniform
    assert [layer.parents for layer in spec.layers] == [(i,) for i in range(LAYERS)]
    attention, ffn = spec.layers[0].attention, spec.layers[0].ffn
    assert attention.heads == 4
    assert (ffn.width, attention.kv_heads, attention.head_dim) == SIZES.get(family_name, (96, 2, 8))


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
    assert [layer.attention.window for layer in spec.layers] == windows


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


@pytest.mark.parametrize(("family_name", "changes", "operation"), DECLINED)
def test_what_a_family_declines_is_refused_with_the_reason(family_name, changes, operation):
    message = re.escape(f"{family_name}: {operation}: {OPERATIONS[operation].declined(declared(family_name, changes))}")
    model = tiny_model(family_name, **changes)
    with pytest.raises(SurgeryError, match=message):
        subject_of(model)[0].check(OPERATIONS[operation].model_construct(op=operation))
    if operation in STEPS:
        with pytest.raises(SurgeryError, match=message):
            operate(model, STEPS[operation])


def test_an_unsupported_family_lists_the_supported_ones():
    with pytest.raises(SurgeryError, match=r"'gptj' is not supported; supported are llama, .*adding-a-family"):
        family_of({"model_type": "gptj"})
    with pytest.raises(SurgeryError, match="None is not supported"):
        family_of({})


def test_a_converted_checkpoint_belongs_to_its_family(family_name):
    assert family_of({"model_type": f"surgeon_{family_name}"}) is FAMILIES[family_name]
