"""Merged key/value heads against a parent whose heads were averaged by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny_model
from operations.helpers import logits, operate, some_tokens, subject_of

from llmsurgeon.errors import SurgeryError
from llmsurgeon.operations.prune_attention import PruneAttention
from llmsurgeon.operations.prune_kv_heads import PruneKVHeads, merge_heads

WITH_KV = ("llama", "mistral", "qwen2", "qwen3")


def averaged(model, groups, layers):
    """The parent with every key/value head replaced by the mean of its group: the same shapes in the same class."""
    merged = copy.deepcopy(model)
    heads = model.config.num_key_value_heads
    with torch.no_grad():
        for layer in layers:
            attention = merged.model.layers[layer].self_attn
            for projection in (attention.k_proj, attention.v_proj):
                for tensor in (projection.weight, projection.bias):
                    if tensor is None:
                        continue
                    by_head = tensor.view(heads, -1)
                    for group in groups:
                        by_head[group] = by_head[group].mean(0)
    return merged


@pytest.mark.parametrize("family_name", WITH_KV)
def test_everywhere_is_the_mean_of_neighbours_and_native(family_name):
    model, tokens = tiny_model(family_name, num_key_value_heads=4), some_tokens()
    merged, written, spec = operate(model, PruneKVHeads(kv_heads=2))
    expected = logits(averaged(model, ([0, 1], [2, 3]), range(6)), tokens)
    torch.testing.assert_close(logits(merged, tokens), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(model, tokens), expected, atol=1e-3)
    assert (written.format, written.config["num_key_value_heads"]) == ("native", 2)
    assert {a.kv_heads for a in spec.attentions} == {2}


@pytest.mark.parametrize("family_name", WITH_KV)
def test_in_some_layers_makes_a_surgeon_checkpoint(family_name):
    model, tokens = tiny_model(family_name), some_tokens()
    merged, written, spec = operate(model, PruneKVHeads(kv_heads=1, layers=(1, 4)))
    expected = logits(averaged(model, ([0, 1],), (1, 4)), tokens)
    torch.testing.assert_close(logits(merged, tokens), expected, atol=1e-4, rtol=1e-4)
    assert written.format == "surgeon"
    assert [a.kv_heads for a in spec.attentions] == [2, 1, 2, 2, 1, 2]
    with pytest.raises(SurgeryError, match=r"format native cannot hold this model: block 1 \(FFN 96, 1 KV heads\)"):
        operate(model, PruneKVHeads(kv_heads=1, layers=(1, 4)), format="native")


@pytest.mark.parametrize("family_name", ["gpt2", "gpt_neox"])
def test_families_with_one_fused_matrix_are_refused(family_name):
    with pytest.raises(SurgeryError, match=f"{family_name} stores queries, keys and values as one matrix"):
        operate(tiny_model(family_name), PruneKVHeads(kv_heads=2))


def test_heads_that_do_not_divide_and_layers_without_attention():
    subject, _, _ = subject_of(tiny_model("llama"))
    for heads in (3, 4):
        with pytest.raises(SurgeryError, match=f"layer 0 has 2 key/value heads, which {heads} does not divide"):
            PruneKVHeads(kv_heads=heads).plan(subject)
    dropped = subject.after(PruneAttention(layers=(2,)).plan(subject))
    with pytest.raises(SurgeryError, match="layer 2 has no attention"):
        PruneKVHeads(kv_heads=1, layers=(2,)).plan(dropped)
    assert {a.kv_heads for a in PruneKVHeads(kv_heads=1).plan(dropped).spec.attentions} == {1}


def test_merge_heads_rounds_once():
    weight = torch.randn(4 * 8, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = torch.stack([weight.view(4, 8, 32)[i : i + 2].double().mean(0) for i in (0, 2)]).flatten(0, 1)
    assert torch.equal(merge_heads(weight, 4, 2), expected.float().bfloat16())
