"""Linears become ternary by rounding: which, how exactly, and what is refused."""

from __future__ import annotations

import pytest
import torch
from conftest import ENCODER_NAMES, FAMILY_NAMES, tiny_encoder, tiny_model
from operations.helpers import declared, logits, operate, some_tokens, subject_of

from llmsurgeon.analysis.scores import compute_scores
from llmsurgeon.errors import RecipeError, SurgeryError
from llmsurgeon.model.ternary import Grid, is_ternary, rounded
from llmsurgeon.operations.ternary import Ternary
from llmsurgeon.operations.ternary_linears import linears_of
from llmsurgeon.recipe.recipe import dump, loads
from llmsurgeon.walk.runner import LayerRunner

TOKENS = some_tokens(8, 16)


def ternary_names(model, family):
    """Names of the weights that are ternary."""
    state = model.state_dict().items()
    return {name for name, t in state if t.dim() == 2 and is_ternary(t.T if family.transposed else t)}


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("linears", ["ffn", "attention", "all"])
def test_the_linears_that_are_named_become_ternary_and_no_others(family, linears):
    model = tiny_model(family)
    student, written, spec = operate(model, Ternary(method="round", linears=linears))
    assert written.format == "native" and spec == subject_of(model)[0].spec
    declaration = declared(family)
    blocks = [name for name in model.state_dict() if name.startswith(f"{declaration.layers}.")]
    weights = {n for n in blocks if n.endswith(".weight") and model.state_dict()[n].dim() == 2}
    wanted = {
        name
        for name in weights
        if linears == "all"
        or declaration.is_attention(name.split(".", declaration.layers.count(".") + 2)[-1]) == (linears == "attention")
    }
    assert ternary_names(student, declaration) == wanted and wanted
    for name, tensor in model.state_dict().items():
        if name not in wanted:
            assert torch.equal(student.state_dict()[name], tensor)


@pytest.mark.parametrize("family", ENCODER_NAMES)
def test_encoders(family):
    model = tiny_encoder(family)
    student, written, _ = operate(model, Ternary(method="round"))
    subject = subject_of(model)[0]
    names = {f"{subject.family.layer(i)}{n}" for i in range(6) for n in linears_of(subject, i)}
    assert written.format == "native" and ternary_names(student, subject.family) == names


def test_it_is_the_plain_function_applied_to_each_weight():
    for family in ("llama", "gpt2"):
        model = tiny_model(family)
        grid = Grid("threshold", "group", 32)
        student, _, _ = operate(model, Ternary(method="round", scale="threshold", granularity="group", group_size=32))
        name = "model.layers.3.mlp.down_proj.weight" if family == "llama" else "transformer.h.3.mlp.c_proj.weight"
        w = model.state_dict()[name]
        expected = rounded(w, grid) if family == "llama" else rounded(w.T, grid).T
        assert torch.equal(student.state_dict()[name], expected)
        assert not torch.equal(logits(student, TOKENS), logits(model, TOKENS))


def test_layers_modules_embedding_and_head():
    model = tiny_model("llama")
    student, _, _ = operate(model, Ternary(method="round", linears="ffn", layers=(1, 4), head=True, embeddings=True))
    found = ternary_names(student, declared("llama"))
    linears = {f"model.layers.{i}.mlp.{n}_proj.weight" for i in (1, 4) for n in ("gate", "up", "down")}
    assert found == linears | {"lm_head.weight", "model.embed_tokens.weight"}
    modules = {"mlp.up_proj": (0, 2), "self_attn.q_proj": (2,)}
    student, _, _ = operate(model, Ternary(method="round", modules=modules))
    assert ternary_names(student, declared("llama")) == {
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.2.self_attn.q_proj.weight",
    }


def scores_of(model, step):
    subject, weights, config = subject_of(model)
    return compute_scores((step,), LayerRunner(config, weights, model.dtype), TOKENS, subject)


def test_a_share_takes_the_cheapest_and_resolves_to_modules():
    model = tiny_model("llama")
    with torch.no_grad():  # a linear that hardly matters, and one that is all but ternary
        model.model.layers[2].mlp.up_proj.weight.mul_(1e-3)
        weight = model.model.layers[4].mlp.gate_proj.weight
        weight.copy_(rounded(weight, Grid()) + 1e-4 * torch.randn_like(weight))
    step = Ternary(method="round", share=0.4, linears="ffn")
    scores = scores_of(model, step)
    assert len(scores["ternary"]) == 6 and set(scores["ternary"][0]) == {
        f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")
    }
    resolved = step.resolve(subject_of(model, scores)[0])
    assert 2 in resolved.modules["mlp.up_proj"] and 4 in resolved.modules["mlp.gate_proj"]
    assert sum(map(len, resolved.modules.values())) == 8  # of 18 equal ones, the first number that is 40 %
    student, _, _ = operate(model, step, scores=scores)
    assert len(ternary_names(student, declared("llama"))) == 8
    recipe = loads("version: 1\nsteps:\n  - {op: ternary, method: round, modules: {mlp.up_proj: [0-2]}}")
    assert loads(dump(recipe)) == recipe and recipe.steps[0].modules == {"mlp.up_proj": (0, 1, 2)}


def test_a_measured_error_is_that_of_the_layer_with_this_weight_rounded():
    model = tiny_model("llama")
    step = Ternary(method="round", share=0.5, layers=(5,))
    error, numbers, size = scores_of(model, step)["ternary"][5]["mlp.down_proj.weight"]
    ends = []
    hook = model.model.layers[5].register_forward_hook(lambda m, i, o: ends.append(o[0] if isinstance(o, tuple) else o))
    logits(model, TOKENS)
    weight = model.model.layers[5].mlp.down_proj.weight
    weight.data = rounded(weight, Grid())
    logits(model, TOKENS)
    hook.remove()
    change = (ends[1] - ends[0]).square().sum(-1) / ends[0].square().sum(-1)
    assert error == pytest.approx(change.mean().item(), rel=1e-4) and (numbers, size) == (32 * 96, 4)


def test_a_size_is_met_or_refused():
    model = tiny_model("llama", dtype=torch.bfloat16)
    everything = sum(2 * t.numel() for t in model.state_dict().values())
    step = Ternary(method="round", max_bytes=everything * 2 // 3)
    scores = scores_of(model, step)
    assert scores["ternary_bytes"] == everything
    student, _, _ = operate(model, step, scores=scores)
    names = ternary_names(student, declared("llama"))
    packed = sum(t.numel() // 4 if n in names else 2 * t.numel() for n, t in student.state_dict().items())
    smallest = min(student.state_dict()[name].numel() for name in names)
    assert everything * 2 // 3 - 2 * 3072 < packed <= everything * 2 // 3 and smallest
    with pytest.raises(SurgeryError, match=r"max_bytes 1,000 is out of reach: with all of all ternary [\d,]+ bytes"):
        operate(model, Ternary(method="round", max_bytes=1000), scores=scores)
    with pytest.raises(SurgeryError, match=r"has [0-9,]+ bytes already; nothing would become ternary"):
        operate(model, Ternary(method="round", max_bytes=10**9), scores=scores)


def test_what_is_ternary_is_refused():
    model = tiny_model("gpt2")
    student, _, _ = operate(model, Ternary(method="round", layers=(3,), linears="ffn"))
    with pytest.raises(SurgeryError, match=r"transformer\.h\.3\.mlp\.c_\w+\.weight is ternary already"):
        operate(student, Ternary(method="round"))
    operate(student, Ternary(method="round", layers=(2,)))


@pytest.mark.parametrize(("step", "message"), [
    (Ternary(head=True, method="round"), "head and embedding are one tied tensor"),
    (Ternary(embeddings=True), "head and embedding are one tied tensor"),
    (Ternary(layers=(9,)), "layer 9 is not in the model"),
    (Ternary(modules={"mlp.fc1": (1,)}), r"layer 1 has no linear mlp\.fc1; it has self_attn\.k_proj, "),
    (Ternary(method="round", granularity="group", group_size=64), r"rows of \d\d numbers are not whole groups of 64"),
    (Ternary(share=0.5), "needs the score 'ternary'"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(step, message):
    with pytest.raises(SurgeryError, match=message):
        operate(tiny_model("llama", tie_word_embeddings=True), step)


def test_mixtures_take_attention_alone():
    model = tiny_model("mixtral")
    with pytest.raises(SurgeryError, match="its FFN is a mixture of experts; linears: attention is possible"):
        operate(model, Ternary(method="round"))
    student, _, _ = operate(model, Ternary(method="round", linears="attention"))
    assert len(ternary_names(student, declared("mixtral"))) == 24


@pytest.mark.parametrize(("keys", "message"), [
    ("granularity: group", "granularity group goes with group_size"),
    ("group_size: 64", "granularity group goes with group_size"),
    ("granularity: group, group_size: 48", "multiple of 32"),
    ("share: 0.5, max_bytes: 10", "share or max_bytes, not both"),
    ("modules: {mlp.up_proj: [1]}, share: 0.5", "modules name their layers"),
    ("scale: mean", "expected 'absmean', 'least_squares' or 'threshold'"),
    ("method: gptq", "expected 'compensated' or 'round'"),
])  # fmt: skip
def test_bad_keys_are_named(keys, message):
    with pytest.raises(RecipeError, match=message):
        loads(f"version: 1\nsteps:\n  - {{op: ternary, {keys}}}")
