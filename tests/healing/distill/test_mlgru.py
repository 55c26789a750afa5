"""Healing of MLGRUs: the closed-form fit of what they write, block-local and global distillation, the ternary ramp."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model
from healing.distill.test_distill import cache, case_of, kl_of, settings_of  # noqa: F401 - a fixture
from healing.refit.test_refit import fresh, kl_to, prepared
from operations.helpers import some_tokens

from llmsurgeon.healing.distill.distill import distill
from llmsurgeon.healing.refit.context import weights_in
from llmsurgeon.healing.refit.refit import refit
from llmsurgeon.healing.store import overlay
from llmsurgeon.operations.matmulfree import MatMulFree
from llmsurgeon.operations.prune_blocks import PruneBlocks
from llmsurgeon.walk.runner import LayerRunner

HYBRID = MatMulFree(layers=(1, 3), context=16)


def attention_error(model, config, weights, tokens, layer):
    """||mixer - attention||^2 / ||attention||^2 of a layer on the parent's own activations."""
    student = LayerRunner(config, weights, model.dtype)
    with torch.no_grad():
        entered = model(input_ids=tokens, output_hidden_states=True).hidden_states[layer]
        student.embed(tokens)
        with student.loaded(layer):
            mine = student.attend(layer, entered)
        parent = LayerRunner(model.config.to_dict(), model.state_dict(), model.dtype)
        parent.embed(tokens)
        with parent.loaded(layer):
            theirs = parent.attend(layer, entered)
    return ((mine - theirs).square().sum() / theirs.square().sum()).item()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "granite"])
def test_the_fit_brings_mixers_nearer_to_attention(family, tmp_path):
    model, tokens = tiny_model(family), some_tokens(batch=96, length=16)
    context, config, weights = prepared(model, HYBRID, tokens=tokens, store=tmp_path / "store")
    before = kl_to(model, config, weights, fresh(16))
    made = refit(context)
    healed = overlay(weights, made.files)
    assert kl_to(model, config, healed, fresh(16)) < 0.95 * before
    errors = [attention_error(model, config, w, fresh(16), 1) for w in (weights, healed)]
    assert errors[1] < 0.95 * errors[0] and errors[1] < 1
    updates = {each.layer: each for each in made.updates if each.projection == "self_attn.o_proj"}
    assert set(updates) == {1, 3} and all(each.accepted and each.error_ratio < 1 for each in updates.values())


def test_the_fit_is_least_squares(tmp_path):
    """On the first changed block the fitted projection is that of one ridge regression on what does not judge."""
    model, tokens = tiny_model("llama"), some_tokens(batch=96, length=16)
    context, config, weights = prepared(model, HYBRID, tokens=tokens, store=tmp_path / "store")
    fits = torch.arange(96) % 4 > 0
    made = refit(context)
    healed = overlay(weights, made.files)
    ridge = next(each.ridge for each in made.updates if each.layer == 1 and each.projection == "self_attn.o_proj")
    student = LayerRunner(config, weights, torch.float32)
    with torch.no_grad():
        entered = model(input_ids=tokens, output_hidden_states=True).hidden_states[1]
        attended = []
        hook = model.model.layers[1].self_attn.register_forward_hook(lambda m, a, out: attended.append(out[0]))
        model(input_ids=tokens)
        hook.remove()
        with student.loaded(1) as layer:
            states, gates = layer.self_attn.mixed(layer.input_layernorm(entered))
            old = layer.self_attn.o_proj.weight.clone()
    counts = weights_in(entered + attended[0])[fits].reshape(-1, 1)
    features, wanted = ((each[fits].flatten(0, 1) * counts).double() for each in (states * gates, attended[0]))
    gram = features.T @ features
    damped = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram))
    update = torch.linalg.solve(damped, features.T @ (wanted - features @ old.double().T))
    expected = old.double() + update.T
    found = healed["model.layers.1.self_attn.o_proj.weight"].double()
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_a_removed_block_behind_a_mixer(tmp_path):
    model, tokens = tiny_model("llama"), some_tokens(batch=96, length=16)
    steps = (MatMulFree(layers=(1,), context=16), PruneBlocks(layers=(2,)))
    context, config, weights = prepared(model, *steps, tokens=tokens, store=tmp_path / "store")
    before = kl_to(model, config, weights, fresh(16))
    assert kl_to(model, config, overlay(weights, refit(context).files), fresh(16)) < before


def test_a_killed_fit_goes_on_where_it_was(tmp_path):
    model, tokens = tiny_model("llama"), some_tokens(batch=48, length=16)
    store = tmp_path / "store"
    first = refit(prepared(model, HYBRID, tokens=tokens, store=store)[0]).files
    kept = {name: overlay_file.read_bytes() for name, overlay_file in first.items()}
    for file in sorted(store.iterdir())[2:]:
        file.unlink()
    again = refit(prepared(model, HYBRID, tokens=tokens, store=store)[0]).files
    assert {name: file.read_bytes() for name, file in again.items()} == kept


@pytest.mark.parametrize("mode", ["local", "global"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_distillation_goes_on_from_there(tmp_path, mode, family):
    case = case_of(tmp_path, (HYBRID,), family)
    before = kl_of(case, case.weights)
    made = distill(case, settings_of(mode=mode))
    assert kl_of(case, overlay(case.weights, made.files)) < 0.9 * before
    moved = {name.split("layers.")[1] for name in made.files if "layers." in name}
    wanted = {f"1.self_attn.{name}" for name in ("lower_bound", "f_proj.bias", "i_proj.weight", "o_proj.weight")}
    assert wanted <= moved
    if mode == "local":
        assert {name[0] for name in moved} == {"1", "3"}


@pytest.mark.parametrize("mode", ["local", "global"])
def test_a_ternary_student_learns_and_is_judged_as_ternary(tmp_path, mode):
    case = case_of(tmp_path, (MatMulFree(layers=(1,), context=16, linears="ternary"),))
    before = kl_of(case, case.weights)
    made = distill(case, settings_of(mode=mode, steps=40))
    # kl_of runs the student in eval mode: all of the way to ternary.
    assert kl_of(case, overlay(case.weights, made.files)) < 0.9 * before
    assert any(name.endswith("q_proj.gain") or name.endswith("i_proj.gain") for name in made.files)
