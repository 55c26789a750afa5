"""The block operation: what it plans, which tensors it makes, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import FAMILY_NAMES, tiny_encoder, tiny_model
from operations.helpers import operate, subject_of

from llmsurgeon.checkpoint.transform import TransformedWeights
from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats.configs import normalised
from llmsurgeon.formats.write import write_config
from llmsurgeon.model.block_transformer import BlockTransformerSpec, from_block_transformer, to_block_transformer
from llmsurgeon.model.families import FAMILIES
from llmsurgeon.model.families.base import BLOCK_FORMS
from llmsurgeon.model.parts import FFFSpec
from llmsurgeon.operations.block import Block, main_directions
from llmsurgeon.operations.distill import Distill
from llmsurgeon.operations.fuse_ffn import FuseFFN
from llmsurgeon.operations.prune_attention import PruneAttention
from llmsurgeon.operations.prune_blocks import PruneBlocks
from llmsurgeon.operations.refit import Refit

NEW = "model.block_embedder.embed_tokens.weight"


def planned(model, step):
    subject, weights, _ = subject_of(model)
    plan = step.resolve(subject).plan(subject)
    return plan, TransformedWeights(weights, plan.transforms), weights


def refusal(model, *steps):
    with pytest.raises(SurgeryError) as caught:
        subject, _, _ = subject_of(model)
        for step in steps:
            subject = subject.after(step.resolve(subject).plan(subject))
    return str(caught.value)


@pytest.mark.parametrize("length", [1, 2, 4, 8])
def test_new_tensors_are_what_the_paper_starts_from(length):
    model = tiny_model("llama")
    plan, made, parent = planned(model, Block(block_length=length))
    assert plan.spec.block_transformer == BlockTransformerSpec(length, 3, affine=True)
    assert set(made) - set(parent) == {
        NEW,
        "model.block_embedder.projection.weight",
        "model.block_embedder.projection.bias",
        "model.context_expansion.weight",
        "model.context_expansion.bias",
        "model.token_projection.weight",
        "model.token_projection.bias",
    }
    assert all(torch.equal(made[name], parent[name]) for name in parent)
    table = parent["model.embed_tokens.weight"]
    assert torch.equal(made[NEW], table)
    x = torch.randn(5, length, 32)
    projected = x.flatten(1) @ made["model.block_embedder.projection.weight"].T
    torch.testing.assert_close(projected, x.mean(1))
    assert not made["model.block_embedder.projection.bias"].any()
    context = torch.randn(5, 32)
    expanded = (context @ made["model.context_expansion.weight"].T).view(5, 2, 32)
    assert torch.equal(expanded, torch.stack([context, context], 1))
    # What the paper does not have begins as nothing.
    assert torch.equal(made["model.token_projection.weight"], torch.eye(32))
    assert not made["model.token_projection.bias"].any() and not made["model.context_expansion.bias"].any()
    assert made["model.context_expansion.bias"].shape == (64,)
    _, paper, _ = planned(model, Block(block_length=length, affine=False))
    assert set(made) - set(paper) == {"model.context_expansion.bias"} | {
        f"model.token_projection.{kind}" for kind in ("weight", "bias")
    }


def test_a_narrow_table_keeps_the_most_inner_products():
    """Against the singular value decomposition; the same to the last bit in any order of blocks of rows."""
    table = torch.randn(500, 32) @ torch.diag(torch.logspace(0, -2, 32))
    made = main_directions(8)(table)
    u, s, _ = torch.linalg.svd(table.double(), full_matrices=False)
    expected = u[:, :8] * s[:8]
    torch.testing.assert_close((made @ made.T).double(), expected @ expected.T, atol=1e-5, rtol=1e-4)
    assert torch.equal(made, main_directions(8)(table.clone()))
    directions = torch.linalg.lstsq(table.double(), made.double()).solution
    assert (directions.gather(0, directions.abs().argmax(0)[None]) > 0).all()
    assert main_directions(8)(table.to("meta")).shape == (500, 8)
    assert main_directions(8)(table.bfloat16()).dtype == torch.bfloat16


def test_summation_and_cross_attention():
    model = tiny_model("qwen2", use_sliding_window=False)
    _, made, _ = planned(model, Block(block_length=4, decoder="summation", embedder="concat"))
    assert made["model.context_expansion.weight"].shape == (4 * 32, 32) and made[NEW].shape == (64, 8)
    plan, made, parent = planned(model, Block(block_length=4, decoder="cross_attention", prefix_length=1, split=4))
    assert made["model.context_expansion.weight"].shape == (32, 32) and plan.spec.block_transformer.split == 4
    for layer in (4, 5):
        for part in ("q_proj.weight", "q_proj.bias", "k_proj.weight", "o_proj.weight"):
            name = f"model.layers.{layer}."
            assert torch.equal(made[f"{name}cross_attn.{part}"], parent[f"{name}self_attn.{part}"])
        assert torch.equal(made[f"{name}cross_attn_layernorm.weight"], parent[f"{name}input_layernorm.weight"])
    assert not any("cross" in name for name in made if ".layers.3." in name)


def test_the_description_goes_there_and_back():
    for spec in (BlockTransformerSpec(4, 3), BlockTransformerSpec(2, 0, "concat", "cross_attention", 1, True)):
        assert from_block_transformer(to_block_transformer(spec), 6, 32) == spec
    model = tiny_model("llama")
    _, written, spec = operate(model, Block(block_length=2, split=2, decoder="summation"))
    assert written.format == "surgeon" and "block transformer: 2 tokens a block" in written.why
    config = normalised(written.config)
    again = FAMILIES["llama"].describe(config)
    assert again == spec
    assert write_config(again, FAMILIES["llama"], config).config["block_transformer"] == to_block_transformer(
        spec.block_transformer
    )
    assert "block_transformer" not in write_config(subject_of(model)[0].spec, FAMILIES["llama"], config).config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"block_length": 4}, "cannot be read: .*split"),
        ({"block_length": 4, "split": 3, "depth": 1}, "cannot be read: .*depth"),
        ({"block_length": "4", "split": 3}, "cannot be read: sizes"),
        ({"block_length": 4, "split": 3, "affine": 1}, "cannot be read: affine 1"),
        ({"block_length": 4, "split": 7}, "from 0 to the 6 layers"),
        ({"block_length": 0, "split": 3}, "must be at least 1"),
        ({"block_length": 5, "split": 3, "embedder": "concat"}, "hidden size 32, which 5 does not divide"),
        ({"block_length": 4, "split": 3, "decoder": "suffix"}, "unknown embedder 'projected' or decoder 'suffix'"),
    ],
)
def test_descriptions_that_cannot_be(config, message):
    with pytest.raises(SurgeryError, match=message):
        from_block_transformer(config, 6, 32)


def test_split_is_numbered_as_in_the_parent():
    model = tiny_model("llama")
    subject, _, _ = subject_of(model)
    subject = subject.after(PruneBlocks(layers=(0, 2)).plan(subject))
    assert Block(split=4).plan(subject).spec.block_transformer.split == 2
    assert Block().resolve(subject) == Block(split=4)
    assert Block(split=6).plan(subject).spec.block_transformer.split == 4
    assert Block(split=0).plan(subject).spec.block_transformer.split == 0


@pytest.mark.parametrize("family", [name for name in FAMILY_NAMES if name not in BLOCK_FORMS])
def test_other_families_are_refused_by_name(family):
    assert refusal(tiny_model(family), Block()) == (
        f"{family}: block: its class has no block form; llama, mistral, qwen2, qwen3 have one"
    )


def test_windows_are_refused_with_the_layer():
    for family, layer in (("mistral", 0), ("qwen2", 3)):
        message = refusal(tiny_model(family), Block())
        assert f"{family}: block: layer {layer} attends within a window of 8 tokens" in message


def test_encoders_are_refused():
    encoder = tiny_encoder("bert")
    config = normalised({**encoder.config.to_dict(), "architectures": ["BertModel"]})
    assert Block.declined(FAMILIES["bert"]) == "it is an encoder: it predicts no next token, and so no next block"
    assert config["model_type"] == "bert"


FUSED = (PruneAttention(layers=(3,)), FuseFFN(runs=((2, 3),)))


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((Block(split=7),), "split 7 is beyond the model's layers, which end at 5"),
        ((Block(), Block()), "block: the model is a block transformer already"),
        ((Block(), PruneAttention(layers=(1,))), "prune_attention: the model is a block transformer already"),
        ((Block(affine=False), Refit()), "this one has affine: false; leave refit out"),
        ((Block(decoder="cross_attention"), Refit()), "this one has decoder cross_attention; leave refit out"),
        ((Block(), FuseFFN(runs=((0, 1),))), "fuse_ffn: the model is a block transformer already"),
        (
            (*FUSED, Block(split=3)),
            "split 3 goes through the layers 2 to 3, which an earlier step made one; use 2 or 4",
        ),
        (
            (PruneAttention(layers=(4,)), Block(decoder="cross_attention")),
            "cross_attention starts from each layer's own attention",
        ),
        ((Block(), Distill()), "has no hidden states that correspond to the parent's; set hidden: 0"),
        ((Block(), Distill(mode="local")), "mode local trains single layers"),
        ((Block(), Distill(hidden=0.0, train="changed")), "train changed names no layer"),
        ((Block(), Distill(hidden=0.0, positions=0.5)), "positions is not for block transformers"),
        ((Block(block_length=8), Distill(hidden=0.0, sequence_length=15)), "sequence_length 15 does not hold a block"),
    ],
)
def test_steps_that_do_not_fit(steps, message):
    assert message in refusal(tiny_model("llama"), *steps)


def test_trees_are_refused():
    subject, _, _ = subject_of(tiny_model("llama"))
    layers = [replace(layer, ffn=FFFSpec.of_leaves(1, 8)) for layer in subject.spec.layers]
    with pytest.raises(SurgeryError, match="block: layer 0 has a fast feedforward network"):
        Block().resolve(replace(subject, spec=subject.spec.with_layers(layers)))


def test_a_width_that_the_block_length_does_not_divide():
    model = tiny_model("llama", hidden_size=36, head_dim=8)
    message = refusal(model, Block(block_length=8, embedder="concat"))
    assert "hidden size 36, which 8 does not divide; use embedder projected" in message
    planned(model, Block(block_length=8))
    planned(model, Block(block_length=4, embedder="concat"))


def test_other_formats_say_why_not():
    model = tiny_model("llama")
    for format, message in (("native", "it is a block transformer"), ("nemotron-nas", "one stack of layers")):
        with pytest.raises(SurgeryError, match=f"format {format} cannot hold this model: .*{message}.*: surgeon"):
            operate(model, Block(), format=format)
