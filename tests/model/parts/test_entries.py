"""Each kind of part as an entry of block_configs, byte for byte, and back."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest

from llmsurgeon.errors import SurgeryError
from llmsurgeon.model import parts
from llmsurgeon.model.parts import AttentionSpec, BitFFNSpec, FFFSpec, FFNSpec, MLGRUSpec, MoESpec
from llmsurgeon.model.spec import LayerSpec, ModelSpec, from_block_configs, to_block_configs

HIDDEN = 32
SOFTMAX = AttentionSpec(heads=8, kv_heads=2, head_dim=16)
# What config.json says, text for text: the order of the keys is part of it.
ATTENTIONS: dict[str, tuple[AttentionSpec | None, str]] = {
    "none": (
        None,
        '{"no_op": true, "replace_with_linear": false, "n_heads_in_group": null, "num_attention_heads": null, '
        '"num_key_value_heads": null}',
    ),
    "softmax": (
        SOFTMAX,
        '{"no_op": false, "replace_with_linear": false, "n_heads_in_group": 4, "num_attention_heads": 8, '
        '"num_key_value_heads": 2}',
    ),
    "normed": (
        replace(SOFTMAX, sub_norm=True),
        '{"no_op": false, "replace_with_linear": false, "n_heads_in_group": 4, "num_attention_heads": 8, '
        '"num_key_value_heads": 2, "sub_norm": true}',
    ),
    "mlgru": (
        MLGRUSpec.instead_of(SOFTMAX, in_bias=True, ternary=True),
        '{"no_op": false, "replace_with_linear": false, "n_heads_in_group": 1, "num_attention_heads": 8, '
        '"num_key_value_heads": 8, "kind": "mlgru", "width": 128, "in_bias": true, "out_bias": false, '
        '"linears": "ternary"}',
    ),
}
FFNS: dict[str, tuple[FFNSpec | None, str]] = {
    "none": (
        None,
        '{"no_op": true, "replace_with_linear": false, "ffn_mult": null, "intermediate_size": null}',
    ),
    "dense": (
        FFNSpec(96),
        '{"no_op": false, "replace_with_linear": false, "ffn_mult": 4.5, "intermediate_size": 96}',
    ),
    "fused and normed": (
        FFNSpec(96, own_norm=True, bias=True, sub_norm=True),
        '{"no_op": false, "replace_with_linear": false, "ffn_mult": 4.5, "intermediate_size": 96, "own_norm": true, '
        '"bias": true, "sub_norm": true}',
    ),
    "moe": (
        MoESpec(96, experts=8, per_token=2),
        '{"no_op": false, "replace_with_linear": false, "ffn_mult": 4.5, "intermediate_size": 96, "kind": "moe", '
        '"num_experts": 8, "num_experts_per_tok": 2}',
    ),
    "leaves": (
        FFFSpec.of_leaves(2, 8, 4, gated=True),
        '{"no_op": false, "replace_with_linear": false, "ffn_mult": 1.6875, "intermediate_size": 36, "kind": "fff", '
        '"form": "leaf", "depth": 2, "leaf_width": 8, "shared": 4, "trees": 0, "gated": true, "in_bias": false}',
    ),
    "nodes": (
        FFFSpec.of_nodes(2, 3, in_bias=True),
        '{"no_op": false, "replace_with_linear": false, "ffn_mult": 0.984375, "intermediate_size": 21, "kind": "fff", '
        '"form": "node", "depth": 2, "leaf_width": 0, "shared": 0, "trees": 3, "gated": false, "in_bias": true}',
    ),
    "bitlinear": (
        BitFFNSpec(96, projections=("mlp.gate_proj", "mlp.down_proj")),
        '{"no_op": false, "replace_with_linear": false, "ffn_mult": 4.5, "intermediate_size": 96, "kind": "bitlinear", '
        '"projections": ["mlp.gate_proj", "mlp.down_proj"]}',
    ),
}


def model(*layers: LayerSpec) -> ModelSpec:
    return ModelSpec("llama", HIDDEN, 64, layers, tied=False)


@pytest.mark.parametrize("ffn", FFNS)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_layer_as_config_json_has_it(attention, ffn):
    (mixer, mixer_text), (feed_forward, ffn_text) = ATTENTIONS[attention], FFNS[ffn]
    made = to_block_configs(model(LayerSpec(mixer, feed_forward, (3, 4))))
    assert json.dumps(made) == f'[{{"attention": {mixer_text}, "ffn": {ffn_text}, "parents": [3, 4]}}]'


def test_branches_come_behind():
    branches = tuple(LayerSpec(ATTENTIONS["softmax"][0], ffn, (place,)) for place, (ffn, _) in enumerate(FFNS.values()))
    (made,) = to_block_configs(model(LayerSpec(None, None, (0, 1), branches)))
    assert list(made) == ["attention", "ffn", "parents", "parallel"]
    assert made["parallel"] == to_block_configs(model(*branches))


def some_attention(rng: random.Random) -> AttentionSpec | None:
    kv_heads, head_dim = rng.choice((1, 2, 4)), rng.choice((4, 16))
    window, rope, sub_norm = rng.choice((None, 8)), rng.random() < 0.5, rng.random() < 0.5
    softmax = AttentionSpec(kv_heads * rng.choice((1, 2, 3)), kv_heads, head_dim, window, rope, sub_norm)
    flags: dict[str, Any] = {key: rng.random() < 0.5 for key in ("in_bias", "out_bias", "ternary")}
    return rng.choice((None, softmax, MLGRUSpec.instead_of(softmax, **flags)))


def some_ffn(rng: random.Random) -> FFNSpec | None:
    width, depth = rng.randint(1, 400), rng.randint(0, 4)
    flags = {key: rng.random() < 0.5 for key in ("own_norm", "bias", "sub_norm")}
    neurons = {key: rng.random() < 0.5 for key in ("gated", "in_bias")}
    experts = rng.randint(1, 8)
    return rng.choice(
        (
            None,
            FFNSpec(width, **flags),
            MoESpec(width, experts=experts, per_token=rng.randint(1, experts)),
            FFFSpec.of_leaves(depth, rng.randint(1, 40), rng.randint(0, 9), **neurons),
            FFFSpec.of_nodes(depth, rng.randint(1, 9), **neurons),
            BitFFNSpec(width, projections=tuple(rng.sample(("gate", "up", "down"), rng.randint(1, 3)))),
        )
    )


@pytest.mark.parametrize("seed", range(40))
def test_any_layer_comes_back_from_json(seed):
    rng = random.Random(seed)
    layers = [LayerSpec(some_attention(rng), some_ffn(rng), (index,)) for index in range(6)]
    layers.append(LayerSpec(None, None, (6, 7), (LayerSpec(some_attention(rng), some_ffn(rng), (6,)), layers[0])))
    entries = json.loads(json.dumps(to_block_configs(model(*layers))))
    for layer, entry in zip(layers, entries, strict=True):
        for alone, own in ((layer, entry), *zip(layer.branches, entry.get("parallel", ()), strict=True)):
            if alone.branches:
                continue
            # Heads' width, windows and rotary positions stand elsewhere in config.json.
            mixer = alone.attention
            (read,) = from_block_configs(
                [own],
                head_dim=mixer.head_dim if mixer else 1,
                windows=[mixer.window if mixer else None],
                ropes=[mixer.rope if mixer else True],
            )
            assert read == alone
            assert to_block_configs(model(read)) == [own]


# What `inspect --json` says of a part, and what it says to people.
SHOWN: tuple[tuple[Any, dict[str, Any], str], ...] = (
    (
        replace(SOFTMAX, window=24, sub_norm=True),
        {"heads": 8, "kv_heads": 2, "head_dim": 16, "window": 24, "rope": True, "sub_norm": True},
        "8 heads, 2 KV, width 16, window 24, normed",
    ),
    (ATTENTIONS["mlgru"][0], {"kind": "mlgru", "width": 128, "linears": "ternary"}, "MLGRU 128, ternary"),
    (FFNSpec(96), {"kind": "dense", "width": 96}, "dense 96"),
    (FFNSpec(96, sub_norm=True), {"kind": "dense", "width": 96, "sub_norm": True}, "dense 96, normed"),
    (FFNS["moe"][0], {"kind": "moe", "width": 96, "experts": 8, "per_token": 2}, "moe 96 x 8, 2 a token"),
    (
        FFNS["leaves"][0],
        {
            "kind": "fff",
            "width": 36,
            "form": "leaf",
            "depth": 2,
            "leaf_width": 8,
            "shared": 4,
            "active": 12,
            "words": "depth 2, 4 leaves of 8 neurons, 4 shared",
        },
        "fff 36: depth 2, 4 leaves of 8 neurons, 4 shared; 12 a token",
    ),
    (
        FFNS["nodes"][0],
        {
            "kind": "fff",
            "width": 21,
            "form": "node",
            "depth": 2,
            "trees": 3,
            "active": 9,
            "words": "3 trees of depth 2",
        },
        "fff 21: 3 trees of depth 2; 9 a token",
    ),
    (FFNS["bitlinear"][0], {"kind": "bitlinear", "width": 96}, "bitlinear 96"),
)


@pytest.mark.parametrize(("part", "row", "label"), SHOWN)
def test_what_inspect_shows(part, row, label):
    assert json.dumps(part.row()) == json.dumps(row)
    assert part.label == label


def test_tables_name_each_part_as_its_entry_does():
    for table in (parts.ATTENTIONS, parts.FFNS):
        assert table == {part.kind: part for part in table.values()}
    with pytest.raises(SurgeryError, match="part of kind 'linear', known here are dense, moe, fff, bitlinear"):
        (entry,) = to_block_configs(model(LayerSpec(None, FFNSpec(96))))
        from_block_configs([{**entry, "ffn": {**entry["ffn"], "kind": "linear"}}], head_dim=1, windows=[None])
