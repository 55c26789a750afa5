"""OPT 350M: norms behind the residual sums, embeddings narrower than the model."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import LAYERS, tiny_model
from operations.helpers import logits, naive, operate, skip, some_tokens, subject_of

from llmsurgeon.errors import SurgeryError
from llmsurgeon.operations.fuse_ffn import FuseFFN
from llmsurgeon.operations.parallel_blocks import ParallelBlocks
from llmsurgeon.operations.prune_attention import PruneAttention
from llmsurgeon.operations.prune_blocks import PruneBlocks
from llmsurgeon.operations.prune_ffn import PruneFFN
from llmsurgeon.walk.runner import LayerRunner
from llmsurgeon.walk.variants import Variant
from llmsurgeon.walk.walk import walk


@pytest.fixture
def model():
    return tiny_model("opt", do_layer_norm_before=False)


def silenced(model, attentions=(), ffns=()):
    """The parent with output projections at zero: the sub-block's norm reads the stream alone."""
    model = copy.deepcopy(model)
    layers = model.model.decoder.layers
    with torch.no_grad():
        for projection in (*(layers[i].self_attn.out_proj for i in attentions), *(layers[i].fc2 for i in ffns)):
            projection.weight.zero_()
            projection.bias.zero_()
    return model


def test_parts_go_and_their_norms_stay(model):
    pruned, _, spec = operate(model, PruneAttention(layers=(0, 3)), PruneFFN(layers=(1,)))
    expected = logits(silenced(model, (0, 3), (1,)), some_tokens())
    torch.testing.assert_close(logits(pruned, some_tokens()), expected, atol=1e-5, rtol=1e-5)
    assert [layer.attention is None for layer in spec.layers] == [True, False, False, True, False, False]
    assert not torch.allclose(logits(model, some_tokens()), expected, atol=1e-2)


def test_blocks_go(model):
    pruned, written, _ = operate(model, PruneBlocks(layers=(1, 4)))
    expected = logits(naive(model, {1: skip, 4: skip}), some_tokens())
    torch.testing.assert_close(logits(pruned, some_tokens()), expected)
    assert written.format == "native" and written.config["do_layer_norm_before"] is False


def test_the_walk_is_the_model(model):
    _, weights, config = subject_of(model)
    tokens = some_tokens(batch=3)
    runner = LayerRunner(config, weights, torch.float32)
    variants = [Variant(), Variant(no_attention=frozenset({2})), Variant(no_ffn=frozenset({LAYERS - 1}))]
    streams = walk(runner, tokens, variants, batch=2)
    with torch.no_grad():
        for stream, parts in zip(streams, [{}, {"attentions": [2]}, {"ffns": [LAYERS - 1]}], strict=True):
            expected = logits(silenced(model, **parts), tokens)
            torch.testing.assert_close(
                torch.stack([runner.final(row) for row in stream]), expected, atol=1e-4, rtol=1e-4
            )


@pytest.mark.parametrize("step", [FuseFFN(runs=((1, 2),)), ParallelBlocks(windows=((1, 2),))], ids=lambda s: s.op)
def test_what_norms_behind_sums_forbid(model, step):
    with pytest.raises(SurgeryError, match=f"opt: {step.op}: its norms follow the residual sums"):
        operate(model, step)
