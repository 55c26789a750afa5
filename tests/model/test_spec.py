"""The description of a model: what it counts, checks and writes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from llmsurgeon.errors import SurgeryError
from llmsurgeon.model.parts import AttentionSpec, FFNSpec
from llmsurgeon.model.spec import LayerSpec, ModelSpec, from_block_configs, to_block_configs

ATTENTION = AttentionSpec(heads=8, kv_heads=2, head_dim=16, window=None)
FULL = LayerSpec(ATTENTION, FFNSpec(96), (0,))
ONLY_FFN = LayerSpec(None, FFNSpec(288), (1, 2))
ONLY_ATTENTION = LayerSpec(replace(ATTENTION, kv_heads=1), None, (3,))
PARALLEL = LayerSpec(None, None, (4, 5), (replace(FULL, parents=(4,)), replace(ONLY_FFN, parents=(5,))))


def model(*layers: LayerSpec) -> ModelSpec:
    return ModelSpec("llama", hidden=32, vocab=64, layers=layers, tied=False)


def test_attentions_come_in_cache_slot_order():
    spec = model(FULL, ONLY_FFN, ONLY_ATTENTION, PARALLEL)
    assert [a.kv_heads for a in spec.attentions] == [2, 1, 2]
    assert spec.kv_numbers_per_token() == 2 * 16 * (2 + 1 + 2)


@pytest.mark.parametrize(
    ("blocks", "uniform"),
    [
        ((FULL, FULL), True),
        ((FULL, replace(FULL, attention=replace(ATTENTION, window=8))), True),
        ((FULL, replace(FULL, ffn=FFNSpec(95))), False),
        ((FULL, ONLY_FFN), False),
        ((ONLY_FFN, ONLY_FFN), False),
        ((ONLY_ATTENTION,), False),
        ((PARALLEL, PARALLEL), False),
    ],
)
def test_uniform(blocks, uniform):
    assert model(*blocks).uniform is uniform


def test_empty():
    assert LayerSpec(None, None).empty
    assert not any(block.empty for block in (FULL, ONLY_FFN, ONLY_ATTENTION, PARALLEL))


def test_block_configs_survive_json_and_come_back():
    blocks = (FULL, ONLY_FFN, ONLY_ATTENTION, PARALLEL)
    configs = json.loads(json.dumps(to_block_configs(model(*blocks))))
    assert from_block_configs(configs, head_dim=16, windows=[None] * 4) == blocks


def test_block_configs_use_the_field_names_of_nemotron_nas():
    full, only_ffn, *_ = to_block_configs(model(FULL, ONLY_FFN))
    assert full["attention"]["n_heads_in_group"] == 4
    assert full["ffn"]["ffn_mult"] == pytest.approx(3 * 96 / (2 * 32))
    assert only_ffn["attention"] == {
        "no_op": True,
        "replace_with_linear": False,
        "n_heads_in_group": None,
        "num_attention_heads": None,
        "num_key_value_heads": None,
    }


def test_windows_go_to_every_attention_of_a_block():
    configs = to_block_configs(model(FULL, PARALLEL))
    blocks = from_block_configs(configs, head_dim=16, windows=[None, 8])
    assert [a.window for b in blocks for a in b.attentions] == [None, 8]


def test_check_layer():
    spec = model(FULL, FULL)
    spec.check_layer(1)
    for index in (-1, 2):
        with pytest.raises(SurgeryError, match=rf"layer {index} is out of range: this model has layers 0 to 1"):
            spec.check_layer(index)


def test_with_blocks_replaces_them():
    assert model(FULL, FULL).with_layers([FULL, ONLY_FFN]).layers == (FULL, ONLY_FFN)
