"""RMSNorms before ternary output projections: what they compute, where they are kept, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny_model
from generation import generate
from operations.helpers import logits, operate, some_tokens, subject_of
from torch import nn

from llmsurgeon.analysis.scores import compute_scores
from llmsurgeon.errors import RecipeError, SurgeryError
from llmsurgeon.model.ternary import Grid, rounded
from llmsurgeon.operations.block import Block
from llmsurgeon.operations.fuse_ffn import FuseFFN
from llmsurgeon.operations.prune_ffn import PruneFFN
from llmsurgeon.operations.prune_kv_heads import PruneKVHeads
from llmsurgeon.operations.refit import Refit
from llmsurgeon.operations.ternary import Ternary
from llmsurgeon.recipe.recipe import loads
from llmsurgeon.walk.runner import LayerRunner

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "granite")
TOKENS = some_tokens(8, 16)


def scores_of(model, *steps):
    subject, weights, config = subject_of(model)
    return compute_scores(steps, LayerRunner(config, weights, model.dtype), TOKENS, subject)


class Behind(nn.Module):
    """A linear that reads a normed input: the slow obvious version."""

    def __init__(self, linear, gain, eps):
        super().__init__()
        self.linear, self.gain, self.eps = linear, gain, eps

    def forward(self, x):
        return self.linear(x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.gain)


def sizes_of(model, layer):
    """Geometric means of the RMS of what the layer's two output projections read."""
    block, seen = model.model.layers[layer], []
    hooks = [
        linear.register_forward_pre_hook(lambda m, i: seen.append(i[0].square().mean(-1).sqrt().log().mean().exp()))
        for linear in (block.self_attn.o_proj, block.mlp.down_proj)
    ]
    logits(model, TOKENS)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_rounded_model_with_normed_inputs(family):
    model = tiny_model(family)
    step = Ternary(method="round", sub_norm=True, layers=(1, 4))
    student, written, spec = operate(model, step, scores=scores_of(model, step))
    assert written.format == "surgeon" and [b.sub_normed for b in spec.layers] == [
        ("attention", "ffn") if i in (1, 4) else () for i in range(6)
    ]
    expected = copy.deepcopy(model)
    for layer in (1, 4):
        sizes, block = sizes_of(model, layer), expected.model.layers[layer]
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = rounded(module.weight.data, Grid())
        for part, name, size in ((block.self_attn, "o_proj", sizes[0]), (block.mlp, "down_proj", sizes[1])):
            setattr(part, name, Behind(getattr(part, name), size, model.config.rms_norm_eps))
    torch.testing.assert_close(logits(student, TOKENS), logits(expected, TOKENS), rtol=1e-4, atol=1e-5)
    generate(student, TOKENS[:2], max_new_tokens=6)
    torch.testing.assert_close(logits(copy.deepcopy(student), TOKENS), logits(student, TOKENS))


def test_norms_stand_before_what_becomes_ternary_alone():
    model = tiny_model("llama")
    step = Ternary(method="round", sub_norm=True, linears="ffn", layers=(2,))
    student, _, spec = operate(model, step, scores=scores_of(model, step))
    assert spec.layers[2].sub_normed == ("ffn",)
    names = [name for name in student.state_dict() if "sub_norm" in name]
    assert names == ["model.layers.2.mlp.ffn_sub_norm.weight"]
    # A second run takes the rest, and leaves the norm that is there.
    more = Ternary(method="round", sub_norm=True, linears="attention", layers=(2,))
    again, _, spec = operate(student, more, scores=scores_of(student, more))
    assert spec.layers[2].sub_normed == ("attention", "ffn")
    name = names[0]
    assert torch.equal(again.state_dict()[name], student.state_dict()[name])
    dropped, _, spec = operate(student, PruneFFN(layers=(2,)))
    assert spec.layers[2].ffn is None and not any("sub_norm" in name for name in dropped.state_dict())


def test_a_dry_run_knows_the_shapes():
    model = tiny_model("qwen3")
    step = Ternary(sub_norm=True)
    student, _, _ = operate(model, step, scores=dict(step.foresee(subject_of(model)[0])))
    assert student.state_dict()["model.layers.0.mlp.ffn_sub_norm.weight"].shape == (96,)
    assert student.state_dict()["model.layers.0.self_attn.attn_sub_norm.weight"].shape == (4 * 16,)


@pytest.mark.parametrize(("family", "message"), [
    ("gpt2", "a norm before output projections is an RMSNorm"),
    ("mixtral", "a norm before output projections is an RMSNorm"),
    ("stablelm", "a norm before output projections is an RMSNorm"),
])  # fmt: skip
def test_families_without_rms_norms_refuse(family, message):
    model, step = tiny_model(family), Ternary(method="round", sub_norm=True, linears="attention")
    with pytest.raises(SurgeryError, match=message):
        operate(model, step, scores=dict(step.foresee(subject_of(model)[0])))


@pytest.mark.parametrize("step", [
    FuseFFN(runs=((2, 3),)), PruneKVHeads(kv_heads=1), Refit(), Block(block_length=2),
])  # fmt: skip
def test_operations_that_do_not_know_the_norms_refuse(step):
    model = tiny_model("llama")
    first = Ternary(method="round", sub_norm=True)
    student, _, _ = operate(model, first, scores=scores_of(model, first))
    with pytest.raises(SurgeryError, match=f"{step.op}: layer 0 has a norm before an output projection, which it does"):
        operate(student, step)


@pytest.mark.parametrize("format", ["native", "nemotron-nas"])
def test_forms_without_a_place_for_the_norms_refuse(format):
    model, step = tiny_model("llama"), Ternary(method="round", sub_norm=True, linears="ffn")
    with pytest.raises(SurgeryError, match="block 0 has a norm before an output projection"):
        operate(model, step, scores=scores_of(model, step), format=format)


def test_the_key_is_read():
    assert loads("version: 1\nsteps:\n  - {op: ternary, sub_norm: true}").steps[0].sub_norm
    with pytest.raises(RecipeError, match="sub_norm"):
        loads("version: 1\nsteps:\n  - {op: ternary, sub_norm: 3}")
