"""Which operation is refused on which part, and in which words: the whole table, literally."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Literal

import pytest

from llmsurgeon.errors import SurgeryError
from llmsurgeon.model.block_transformer import BlockTransformerSpec
from llmsurgeon.model.families import FAMILIES
from llmsurgeon.model.parts import AttentionSpec, BitFFNSpec, FFFSpec, FFNSpec, MLGRUSpec, MoESpec, Touch
from llmsurgeon.model.spec import LayerSpec, ModelSpec
from llmsurgeon.operations import OPERATIONS, Step, Subject

SOFTMAX, DENSE = AttentionSpec(heads=4, kv_heads=2, head_dim=8), FFNSpec(96)
MLGRU = MLGRUSpec.instead_of(SOFTMAX)
LEAVES, NODES = FFFSpec.of_leaves(2, 8), FFFSpec.of_nodes(2, 3)
BITS = BitFFNSpec(96, projections=("mlp.up_proj",))

IS_MLGRU = "layer 3 has an MLGRU in the place of its attention; cut first, matmulfree comes last"
IS_BITS = "layer 3 has BitLinears in its FFN; cut first, matmulfree comes last"
IS_TREES = "layer 3 has a fast feedforward network; cut first, fff comes last"
IS_NORMED = "layer 3 has a norm before an output projection, which it does not know; do it before ternary with sub_norm"
NORMS_FORBID = (
    "prune_kv_heads prune_heads prune_width prune_experts fuse_ffn parallel_blocks fff matmulfree block refit"
)
IS_BLOCKS = (
    "the model is a block transformer already, whose layers are not one stack; cut first, block comes last, and refit "
    "and distill heal it"
)

# The parts of layer 3, and each sentence with the operations that it keeps from a model which has such a layer.
REFUSED: dict[str, tuple[LayerSpec, dict[str, str]]] = {
    "softmax attention and a dense FFN": (LayerSpec(SOFTMAX, DENSE), {}),
    "no FFN": (LayerSpec(SOFTMAX, None), {}),
    "no attention": (LayerSpec(None, DENSE), {}),
    "experts": (LayerSpec(SOFTMAX, MoESpec(96, experts=4, per_token=2)), {}),
    "a fused FFN": (LayerSpec(None, FFNSpec(96, own_norm=True, bias=True)), {}),
    "an MLGRU": (LayerSpec(MLGRU, DENSE), {IS_MLGRU: "prune_kv_heads prune_heads parallel_blocks block"}),
    "a ternary MLGRU": (
        LayerSpec(replace(MLGRU, ternary=True), DENSE),
        {IS_MLGRU: "prune_kv_heads prune_heads parallel_blocks block"},
    ),
    "trees of leaves": (
        LayerSpec(SOFTMAX, LEAVES),
        {IS_TREES: "prune_ffn prune_width prune_experts fuse_ffn parallel_blocks ternary block"},
    ),
    "trees of nodes": (
        LayerSpec(SOFTMAX, NODES),
        {IS_TREES: "prune_ffn prune_width prune_experts fuse_ffn parallel_blocks ternary block"},
    ),
    "BitLinears": (
        LayerSpec(SOFTMAX, BITS),
        {IS_BITS: "prune_kv_heads prune_heads prune_width prune_experts fuse_ffn parallel_blocks fff ternary block"},
    ),
    "a norm in attention": (
        LayerSpec(replace(SOFTMAX, sub_norm=True), DENSE),
        {IS_NORMED: NORMS_FORBID},
    ),
    "a norm in the FFN": (
        LayerSpec(SOFTMAX, replace(DENSE, sub_norm=True)),
        {IS_NORMED: NORMS_FORBID},
    ),
    "a norm in both": (
        LayerSpec(replace(SOFTMAX, sub_norm=True), replace(DENSE, sub_norm=True)),
        {IS_NORMED: NORMS_FORBID},
    ),
    "an MLGRU and trees": (
        LayerSpec(MLGRU, LEAVES),
        {
            IS_MLGRU: "prune_kv_heads prune_heads parallel_blocks block",
            IS_TREES: "prune_ffn prune_width prune_experts fuse_ffn ternary",
        },
    ),
    "a ternary MLGRU and BitLinears": (
        LayerSpec(replace(MLGRU, ternary=True), BITS),
        {
            IS_MLGRU: "prune_kv_heads prune_heads parallel_blocks block",
            IS_BITS: "prune_width prune_experts fuse_ffn fff ternary",
        },
    ),
}


def refusal(operation: str, layer: LayerSpec, block_transformer: BlockTransformerSpec | None = None) -> str | None:
    """What a family that takes the operation says of it on a model with this layer behind one of its own."""
    family = FAMILIES["mixtral" if operation == "prune_experts" else "llama"]
    layers = (LayerSpec(SOFTMAX, DENSE, (0,)), replace(layer, parents=(3,)))
    spec = ModelSpec(family.model_type, 32, 64, layers, tied=False, block_transformer=block_transformer)
    try:
        Subject(spec, family, frozenset()).check(OPERATIONS[operation].model_construct(op=operation))
    except SurgeryError as error:
        return str(error).removeprefix(f"{family.model_type}: {operation}: ")
    return None


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("has", REFUSED)
def test_every_operation_on_every_part(operation, has):
    layer, refused = REFUSED[has]
    expected = {name: sentence for sentence, names in refused.items() for name in names.split()}
    assert expected.keys() <= OPERATIONS.keys()
    assert refusal(operation, layer) == expected.get(operation)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_on_a_block_transformer(operation):
    heals = operation in ("refit", "distill")
    said = refusal(operation, LayerSpec(SOFTMAX, DENSE), BlockTransformerSpec(2, 1))
    assert said == (None if heals else IS_BLOCKS)


class Unsaid(Step):
    """A step that does not say what it does."""

    op: Literal["unsaid"] = "unsaid"


@pytest.mark.parametrize("has", REFUSED)
def test_a_step_that_does_not_say_what_it_does_is_taken_to_do_everything(has):
    layer, refused = REFUSED[has]
    spec = ModelSpec("llama", 32, 64, (replace(layer, parents=(3,)),), tied=False)
    subject = Subject(spec, FAMILIES["llama"], frozenset())
    if not refused:
        subject.check(Unsaid())
        return
    with pytest.raises(SurgeryError, match=re.escape(f"llama: unsaid: {next(iter(refused))}")):
        subject.check(Unsaid())


def test_every_operation_says_what_it_does():
    assert all("touches" in vars(step) and step.touches < frozenset(Touch) for step in OPERATIONS.values())
