"""Merged key/value heads against a parent whose heads were averaged by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny_model
from operations.helpers import declared, logits, operate, some_tokens, subject_of, taking

from llmsurgeon.errors import SurgeryError
from llmsurgeon.operations.prune_attention import PruneAttention
from llmsurgeon.operations.prune_kv_heads import PruneKVHeads, merge_heads

WITH_KV = taking("prune_kv_heads")


def heads_of(attention, family, spec):
    """Every tensor of a key/value projection as a view [kv_heads, rows, ...]."""
    if family.fused_qkv is None:
        modules = [attention.get_submodule(name) for name in family.kv]
        return [tensor.view(spec.kv_heads, -1) for module in modules for tensor in module.parameters()]
    name, rows = family.fused_qkv
    tensors = list(attention.get_submodule(name).parameters())
    if rows == "by kind":
        queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        parts = [t[queries + start : queries + start + keys] for t in tensors for start in (0, keys)]
        return [part.view(spec.kv_heads, -1) for part in parts]
    groups = [tensor.view(spec.kv_heads, -1, spec.head_dim, *tensor.shape[1:]) for tensor in tensors]
    return [group[:, place] for group in groups for place in (-2, -1)]


def averaged(model, groups, layers):
    """The parent with every key/value head replaced by the mean of its group: the same shapes in the same class."""
    merged = copy.deepcopy(model)
    subject, _, _ = subject_of(model)
    family = subject.family
    with torch.no_grad():
        for layer in layers:
            attention = getattr(merged.get_submodule(family.layers)[layer], family.attention)
            for by_head in heads_of(attention, family, subject.spec.layers[layer].attention):
                for group in groups:
                    by_head[group] = by_head[group].mean(0)
    return merged


@pytest.mark.parametrize(("family_name", "changes"), WITH_KV)
def test_everywhere_is_the_mean_of_neighbours_and_native(family_name, changes):
    key = declared(family_name, changes).kv_heads_key
    model, tokens = tiny_model(family_name, **changes, **{key: 4}), some_tokens()
    merged, written, spec = operate(model, PruneKVHeads(kv_heads=2))
    expected = logits(averaged(model, ([0, 1], [2, 3]), range(6)), tokens)
    torch.testing.assert_close(logits(merged, tokens), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(model, tokens), expected, atol=1e-3)
    assert (written.format, written.config[key]) == ("native", 2)
    assert {a.kv_heads for a in spec.attentions} == {2}


@pytest.mark.parametrize(("family_name", "changes"), WITH_KV)
def test_in_some_layers_makes_a_surgeon_checkpoint(family_name, changes):
    model, tokens = tiny_model(family_name, **changes), some_tokens()
    step = PruneKVHeads(kv_heads=1, layers=(1, 4))
    merged, _, spec = operate(model, step, format="surgeon")
    expected = logits(averaged(model, ([0, 1],), (1, 4)), tokens)
    torch.testing.assert_close(logits(merged, tokens), expected, atol=1e-4, rtol=1e-4)
    assert [a.kv_heads for a in spec.attentions] == [2, 1, 2, 2, 1, 2]


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
