"""Fewer experts against the parent with those experts hidden from its routers."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import LAYERS, MIXTURE_NAMES, byte_tokenizer, save_tiny, tiny_model
from operations.helpers import logits, operate, some_tokens, subject_of
from transformers import AutoModelForCausalLM
from walk.test_walk import runner_of

from llmsurgeon.analysis.experts import weigh_experts
from llmsurgeon.errors import SurgeryError
from llmsurgeon.operations.prune_experts import PruneExperts


@pytest.fixture(params=MIXTURE_NAMES)
def name(request):
    return request.param


def hidden_from(model, gone):
    """The parent, each layer's router blind to the experts of `gone[layer]`: in plain sums, one expert at a time."""
    model = copy.deepcopy(model)
    for layer, experts in gone.items():
        mixture = model.model.layers[layer].mlp

        def forward(hidden, mixture=mixture, experts=experts):
            x = hidden.flatten(0, -2)
            scores = F.linear(x, mixture.gate.weight)
            scores[:, list(experts)] = -torch.inf
            probabilities = scores.softmax(-1)
            top, chosen = probabilities.topk(mixture.gate.top_k, dim=-1)
            if getattr(mixture.gate, "norm_topk_prob", True):
                top = top / top.sum(-1, keepdim=True)
            made = torch.zeros_like(x)
            for token in range(len(x)):
                for weight, expert in zip(top[token], chosen[token].tolist(), strict=True):
                    gate, up = (mixture.experts.gate_up_proj[expert] @ x[token]).chunk(2)
                    made[token] += weight * (mixture.experts.down_proj[expert] @ (F.silu(gate) * up))
            return made.view_as(hidden)

        mixture.forward = forward
    return model


@pytest.mark.parametrize("keep", [2, 3])
def test_routers_choose_among_those_that_stay(name, keep):
    model, tokens = tiny_model(name), some_tokens()
    scores = {layer: torch.rand(4, generator=torch.Generator().manual_seed(layer)) for layer in range(LAYERS)}
    student, written, spec = operate(model, PruneExperts(experts=keep), scores={"expert_reap": scores})
    assert written.format == "native" and {block.ffn.experts for block in spec.layers} == {keep}
    gone = {layer: scores[layer].argsort()[: 4 - keep].tolist() for layer in scores}
    torch.testing.assert_close(logits(student, tokens), logits(hidden_from(model, gone), tokens), atol=1e-4, rtol=1e-4)


def test_worth_against_one_token_at_a_time(name):
    model, tokens = tiny_model(name), some_tokens(batch=3, length=10)
    found = weigh_experts(runner_of(model), tokens, {0, 3}, with_loss=True, batch=2)
    for layer, worth in found.items():
        block, read = model.model.layers[layer], []
        hook = block.mlp.register_forward_pre_hook(lambda _, inputs, read=read: read.append(inputs[0]))
        with torch.no_grad():
            model(tokens)
            hook.remove()
            x = read[0].flatten(0, -2)
            whole = hidden_from(model, {layer: []}).model.layers[layer].mlp(x)
            torch.testing.assert_close(whole, block.mlp(read[0]).flatten(0, -2), atol=1e-5, rtol=1e-4)
            _, weights, chosen = block.mlp.gate(x)
            for expert in range(4):
                without = hidden_from(model, {layer: [expert]}).model.layers[layer].mlp(x)
                expected = (without - whole).square().sum(-1).mean()
                torch.testing.assert_close(worth.loss[expert], expected, atol=1e-6, rtol=1e-3)
                norms = [
                    float(weight * (block.mlp.experts.down_proj[expert] @ (F.silu(gate) * up)).norm())
                    for token in range(len(x))
                    for weight, each in zip(weights[token], chosen[token].tolist(), strict=True)
                    if each == expert
                    for gate, up in [(block.mlp.experts.gate_up_proj[expert] @ x[token]).chunk(2)]
                ]
                assert float(worth.reap[expert]) == pytest.approx(sum(norms) / max(len(norms), 1), rel=1e-3)


@pytest.mark.parametrize("score", ["reap", "loss"])
def test_from_the_command_line(name, score, tmp_path, run):
    parent = save_tiny(tmp_path / "parent", name)
    byte_tokenizer().save_pretrained(parent)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 60)
    (tmp_path / "r.yaml").write_text(
        "version: 1\ncalibration: {tokens: 512, sequence_length: 16}\nsteps:\n"
        f"  - {{op: prune_experts, keep: 0.75, score: {score}}}\n  - {{op: refit}}\n"
    )
    code, _, err = run("run", tmp_path / "r.yaml", parent, "-o", tmp_path / "out", "--text", tmp_path / "text.txt")
    assert code == 0, err
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    count = "num_experts" if name == "qwen3_moe" else "num_local_experts"
    assert config[count] == 3 and config["num_experts_per_tok"] == 2 and len(model.model.layers[0].mlp.gate.weight) == 3
    assert run("run", tmp_path / "r.yaml", parent, "--dry-run")[0] == 0


def test_steps_that_do_not_fit(name):
    scores = {"expert_reap": torch.rand(LAYERS, 4)}
    subject, _, _ = subject_of(tiny_model(name), scores)
    with pytest.raises(SurgeryError, match="a token is sent to 2 experts, and 1 would stay"):
        PruneExperts(experts=1).plan(subject)
    assert PruneExperts(experts=1, per_token=1).plan(subject).spec.layers[0].ffn.per_token == 1
    with pytest.raises(SurgeryError, match="layer 0 has 4 experts, 5 asked for"):
        PruneExperts(experts=5).plan(subject)
    with pytest.raises(SurgeryError, match="there are no experts to drop"):
        PruneExperts(experts=2).plan(subject_of(tiny_model("llama"))[0])
    with pytest.raises(ValueError, match="takes exactly one of experts, keep"):
        PruneExperts()
