"""Codes that compensate, found on a walk: nearer to the dense student than rounding, exactly ternary, resumable."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import ENCODER_NAMES, FAMILY_NAMES, tiny_encoder, tiny_model
from operations.helpers import logits, some_tokens, subject_of
from operations.test_sub_norm import scores_of
from safetensors import safe_open

from llmsurgeon.checkpoint.transform import TransformedWeights
from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats.configs import normalised
from llmsurgeon.formats.models import filled_model
from llmsurgeon.formats.write import write_config
from llmsurgeon.healing.batches import Batches, token_weights
from llmsurgeon.healing.distill.latent import install
from llmsurgeon.healing.refit.context import Context, RefitOptions
from llmsurgeon.healing.refit.refit import refit
from llmsurgeon.healing.store import LayerStore, overlay
from llmsurgeon.healing.ternary.context import TernaryContext
from llmsurgeon.healing.ternary.linears import summary
from llmsurgeon.healing.ternary.ternarise import ternarise
from llmsurgeon.model.ternary import Grid, compensated, grid_of, is_ternary
from llmsurgeon.operations.ternary import Ternary
from llmsurgeon.walk.runner import LayerRunner
from llmsurgeon.walk.variants import Variant
from llmsurgeon.walk.walk import walk

TOKENS = some_tokens(48, 16)
HELD = torch.arange(48) % 8 == 7


def made_of(folder, model, step, ridges=(0.03, 0.3), tokens=TOKENS):
    """(weights of the ternary model, what was made)."""
    folder.mkdir(exist_ok=True)
    subject, weights, config = subject_of(model)
    runner = LayerRunner(config, weights, model.dtype)
    text = Batches.of(tokens, HELD, 8)
    made = ternarise(TernaryContext(runner, step.chosen(subject), text, step.grid, ridges, LayerStore(folder)))
    return overlay(weights, made.files), made


def distance(model, weights):
    """Mean squared relative distance of the last hidden states on held-out sequences."""
    _, base, config = subject_of(model)
    ends = [walk(LayerRunner(config, w, model.dtype), TOKENS[HELD], [Variant()])[0].float() for w in (base, weights)]
    return ((ends[0] - ends[1]).square().sum() / ends[0].square().sum()).item()


def rounded_weights(model, step):
    subject, weights, _ = subject_of(model)
    return TransformedWeights(weights, step.model_copy(update={"method": "round"}).plan(subject).transforms)


@pytest.mark.parametrize("family", [*FAMILY_NAMES, *ENCODER_NAMES])
def test_it_errs_less_than_rounding(tmp_path, family):
    model = (tiny_encoder if family in ENCODER_NAMES else tiny_model)(family)
    step = Ternary(granularity="row", layers=(1, 3))
    weights, work = made_of(tmp_path, model, step)
    assert distance(model, weights) < 0.95 * distance(model, rounded_weights(model, step))
    subject = subject_of(model)[0]
    names = {subject.family.layer(i) + n for i, names in step.chosen(subject).items() for n in names}
    assert len(work.linears) == len(names) and all(entry.error <= entry.rounding for entry in work.linears)
    for name in weights:
        tensor = weights[name].T if subject.family.transposed and weights[name].dim() == 2 else weights[name]
        assert is_ternary(tensor) == (name in names), name
        if name in names:
            assert grid_of(tensor).granularity == "row"
    assert summary(work.linears).startswith(f"Ternarised {len(names)} linears")


def test_the_first_linear_is_the_plain_function_on_what_it_reads(tmp_path):
    """Of the sequences that fit; those that judge are not among them."""
    model = tiny_model("llama")
    weights, _ = made_of(tmp_path, model, Ternary(layers=(2,), linears="attention"))
    read = []
    hook = model.model.layers[2].self_attn.q_proj.register_forward_pre_hook(
        lambda m, i: read.append(i[0].flatten(0, 1))
    )
    with torch.no_grad():
        model(input_ids=TOKENS[~HELD])
    hook.remove()
    name = "model.layers.2.self_attn.q_proj.weight"
    expected, _, _ = compensated(model.state_dict()[name], read[0].T @ read[0], Grid(), torch.float32)
    agree = (torch.sign(expected) == torch.sign(weights[name])).float().mean()
    assert agree > 0.99 and weights[name].abs().max() == pytest.approx(expected.abs().max().item(), rel=2e-2)


def test_what_stays_dense_makes_up_for_what_became_ternary(tmp_path):
    model = tiny_model("llama")
    step = Ternary(linears="ffn", layers=(0, 1, 2))
    still, _ = made_of(tmp_path / "a", model, step, ridges=())
    aligned, work = made_of(tmp_path / "b", model, step)
    assert distance(model, aligned) < 0.9 * distance(model, still)
    base = subject_of(model)[1]
    unmoved = [n for n in base if n.startswith("model.layers.") and torch.equal(base[n], still[n])]
    assert len(unmoved) == len([n for n in base if n.startswith("model.layers.")]) - 9
    moved = {n for n in base if not torch.equal(base[n], aligned[n])}
    # What reads and what writes; where a move does not help on held-out tokens, none is made.
    assert {"model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.o_proj.weight"} <= moved
    assert not {n for n in moved if n.startswith("model.layers.0.self_attn") or "norm" in n or "embed" in n}
    assert any(entry.moved < 1 for entry in work.linears)


def test_a_large_token_counts_as_the_median():
    stream = torch.ones(2, 3, 4)
    stream[0, 0] *= 100
    stream[1, 2] *= 0.5
    expected = torch.tensor([[0.01, 1, 1], [1, 1, 1]])
    torch.testing.assert_close(token_weights(stream), expected)


def test_massive_first_tokens_do_not_decide_the_fit(tmp_path, monkeypatch):
    """As in pretrained decoders, one neuron makes every window's first token far larger than the others."""
    model, tokens = tiny_model("llama"), TOKENS.clamp(min=1)
    tokens[:, 0] = 0
    with torch.no_grad():
        first, mlp = model.model.embed_tokens.weight[0], model.model.layers[1].mlp
        mlp.gate_proj.weight[0] = mlp.up_proj.weight[0] = 6 * first / first.norm()
        mlp.down_proj.weight[:, 0] *= 100

    def error(name):
        weights, _ = made_of(tmp_path / name, model, Ternary(linears="ffn", layers=(1, 2, 3)), tokens=tokens)
        _, base, config = subject_of(model)
        ends = [walk(LayerRunner(config, w, model.dtype), tokens[HELD], [Variant()])[0] for w in (base, weights)]
        before, after = (end.float()[:, 1:] for end in ends)
        return ((before - after).square().sum(-1) / before.square().sum(-1)).mean().item()

    with torch.no_grad():
        sizes = model.model(input_ids=tokens, output_hidden_states=True).hidden_states[2].norm(dim=-1)
    assert (sizes[:, 0] > 5 * sizes[:, 1:].median()).all()
    fitted = error("weighted")
    monkeypatch.setattr(
        "llmsurgeon.healing.ternary.group.token_weights", lambda stream: stream.new_ones(stream.shape[:2])
    )
    assert fitted < 0.9 * error("alike")


def test_scales_are_numbers_of_the_stored_dtype(tmp_path):
    model = tiny_model("llama", dtype=torch.bfloat16)
    weights, _ = made_of(tmp_path, model, Ternary(linears="ffn"))
    weight = weights["model.layers.5.mlp.up_proj.weight"]
    assert weight.dtype == torch.bfloat16 and is_ternary(weight)
    assert torch.equal(weight.half().bfloat16(), weight)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    model = tiny_model("llama")
    step = Ternary(layers=(1, 2, 4))
    whole, work = made_of(tmp_path / "whole", model, step)
    files = sorted((tmp_path / "whole").glob("layer-*.safetensors"))
    assert [int(f.stem[-4:]) for f in files] == [1, 2, 3, 4, 5]
    for kept in (1, 3):
        folder = tmp_path / f"after-{kept}"
        folder.mkdir()
        for file in files[:kept]:
            (folder / file.name).write_bytes(file.read_bytes())
        resumed, again = made_of(folder, model, step)
        assert again.linears == work.linears
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)
        for file in files:
            with safe_open(file, "pt") as a, safe_open(folder / file.name, "pt") as b:
                assert all(torch.equal(a.get_tensor(n), b.get_tensor(n)) for n in a.keys())  # noqa: SIM118


def test_what_is_ternary_is_refused(tmp_path):
    model = tiny_model("llama")
    weights, _ = made_of(tmp_path, model, Ternary(layers=(2,)))
    model.load_state_dict(dict(weights))
    with pytest.raises(SurgeryError, match=r"model\.layers\.2\.\S+ is ternary already"):
        made_of(tmp_path / "again", model, Ternary())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "bert"])
def test_refit_moves_what_is_dense_and_leaves_ternary_alone(tmp_path, family):
    model = (tiny_encoder if family == "bert" else tiny_model)(family)
    step = Ternary(linears="ffn", layers=(1, 2))
    weights = rounded_weights(model, step)
    subject, base, config = subject_of(model)
    parent, student = LayerRunner(config, base, model.dtype), LayerRunner(config, weights, model.dtype)
    specs, text = (subject.spec, subject.spec), Batches.of(TOKENS, HELD, 8)
    made = refit(Context(parent, student, *specs, text, RefitOptions(), LayerStore(tmp_path)))
    healed = overlay(weights, made.files)
    names = {subject.family.layer(i) + n for i, names in step.chosen(subject).items() for n in names}
    assert all(torch.equal(healed[name], weights[name]) for name in names)
    assert any(not torch.equal(healed[name], weights[name]) for name in weights)
    assert not any(
        each.projection == subject.family.ffn_module(subject.family.ffn_out)
        for each in made.updates
        if each.layer in (1, 2)
    )
    assert distance(model, healed) < distance(model, weights)


def with_norms(folder, model, step):
    """(weights of the ternary model with norms and their config, the same by rounding, what was made)."""
    subject, weights, _ = subject_of(model)
    scores = scores_of(model, step)
    subject = replace(subject, scores=scores)
    plan = step.plan(subject)
    config = normalised(write_config(plan.spec, subject.family, subject_of(model)[2], "surgeon").config)
    dense = TransformedWeights(weights, plan.transforms)
    runner, after = LayerRunner(config, dense, model.dtype), subject.after(plan)
    normed = {index: step.normed(subject)[index] for index in step.normed(subject)}
    text, store = Batches.of(TOKENS, HELD, 8), LayerStore(folder)
    made = ternarise(TernaryContext(runner, step.chosen(after), text, step.grid, (0.03, 0.3), store, normed))
    by_rounding = step.model_copy(update={"method": "round"}).plan(subject).transforms
    return config, overlay(dense, made.files), TransformedWeights(weights, by_rounding), made


def distance_to(model, config, weights):
    _, base, plain = subject_of(model)
    ends = [
        walk(LayerRunner(c, w, model.dtype), TOKENS[HELD], [Variant()])[0].float()
        for c, w in ((plain, base), (config, weights))
    ]
    return ((ends[0] - ends[1]).square().sum() / ends[0].square().sum()).item()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_norms_before_output_projections_are_made_up_for(tmp_path, family):
    model = tiny_model(family)
    step = Ternary(layers=(1, 4), sub_norm=True)
    config, weights, by_rounding, work = with_norms(tmp_path, model, step)
    assert distance_to(model, config, weights) < 0.9 * distance_to(model, config, by_rounding)
    writers = {"self_attn.o_proj", "mlp.down_proj"}
    names = {f"model.layers.{e.layer}.{e.linear}.weight" for e in work.linears}
    assert len(names) == 14 and all(is_ternary(weights[name]) for name in names)
    assert any(entry.moved < 1 for entry in work.linears if entry.layer == 1 and entry.linear in writers)
    gains = [weights[name] for name in weights if "sub_norm" in name]
    assert len(gains) == 4 and all(gain.std() > 0 for gain in gains)
    # Nothing before the first norm knows of them: its errors are those without.
    (tmp_path / "without").mkdir()
    _, plain = made_of(tmp_path / "without", model, step.model_copy(update={"sub_norm": False}))
    first = {e.linear: e.error for e in plain.linears if e.layer == 1 and e.linear in ("self_attn.q_proj",)}
    assert {e.linear: e.error for e in work.linears if e.layer == 1 and e.linear in first} == first


def test_a_killed_run_with_norms_goes_on_bit_for_bit(tmp_path):
    model, step = tiny_model("llama"), Ternary(layers=(1, 3), sub_norm=True)
    (tmp_path / "whole").mkdir()
    _, whole, _, work = with_norms(tmp_path / "whole", model, step)
    folder = tmp_path / "after"
    folder.mkdir()
    for file in sorted((tmp_path / "whole").glob("layer-*.safetensors"))[:2]:
        (folder / file.name).write_bytes(file.read_bytes())
    _, resumed, _, again = with_norms(folder, model, step)
    assert again.linears == work.linears and all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_distillation_keeps_the_norms_before_latent_weights(tmp_path):
    model, step = tiny_model("llama"), Ternary(layers=(2,), sub_norm=True)
    config, weights, _, _ = with_norms(tmp_path, model, step)
    student = filled_model(config, weights, torch.float32, "cpu")
    expected = logits(student, TOKENS[:2])
    moving = {name for name, _ in student.named_parameters()}
    install(student, moving, lambda name: None, lambda name: torch.float32, False)
    torch.testing.assert_close(logits(student, TOKENS[:2]), expected, rtol=1e-4, atol=1e-5)
