"""Ternary students in training: latent weights, the schedule, an exactly ternary result, and runs that go on."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import tiny_model
from healing.distill.test_distill import cache, case_of, kl_of, settings_of  # noqa: F401 - a fixture
from torch import nn

from llmsurgeon.errors import SurgeryError
from llmsurgeon.healing.distill.distill import distill
from llmsurgeon.healing.distill.latent import LatentLinear, packed, started, ternary_of
from llmsurgeon.healing.distill.loop import Trainer
from llmsurgeon.healing.distill.schedule import coarse_share
from llmsurgeon.healing.distill.student import build_student
from llmsurgeon.healing.store import overlay
from llmsurgeon.model.ternary import Grid, grid_of, is_ternary, rounded, taken_apart
from llmsurgeon.operations.distill import Distill, Lora
from llmsurgeon.operations.fuse_ffn import FuseFFN
from llmsurgeon.operations.prune_attention import PruneAttention
from llmsurgeon.operations.ternary import Ternary

GRIDS = [Grid(), Grid(granularity="row"), Grid(granularity="group", group_size=32)]
FFNS = (Ternary(method="round", linears="ffn", layers=(1, 4)),)


def ternary_in(weights, transposed=False):
    names = [name for name in weights if weights[name].dim() == 2]
    return {name for name in names if is_ternary(weights[name].T if transposed else weights[name])}


def linear_of(grid, dense=None, dtype=torch.float32, transposed=False):
    """(the module, the student's weight [O, I], the parent's)."""
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0)) if dense is None else dense
    ternary = rounded(weight.to(dtype), grid)
    return LatentLinear(nn.Linear(64, 24), ternary, weight, transposed, dtype), ternary, weight


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.granularity)
def test_a_latent_linear_begins_dense_and_ends_as_the_students(grid):
    module, ternary, dense = linear_of(grid)
    x = torch.randn(5, 64)
    module.train()
    for share in (0.0, 0.3, 1.0):
        module.share = share
        torch.testing.assert_close(module(x), x @ ((1 - share) * module.weight + share * ternary).T + module.bias)
    assert torch.equal(module.seen(), ternary)
    module.share = 0.0
    module.eval()
    assert torch.equal(module.seen(), ternary), "it is judged as it will be written"
    # Weights that round to the student's codes anyway start as the parent's.
    agree = (module.weight - dense).abs() < 1e-6
    assert agree.float().mean() > 0.8


def test_codes_that_were_compensated_are_not_lost():
    codes = torch.randint(-1, 2, (24, 64), generator=torch.Generator().manual_seed(3)).float()
    scale = torch.full((24, 1), 0.5)
    dense = torch.randn(24, 64)
    latent = started(codes, scale, dense)
    assert torch.equal(torch.sign(ternary_of(latent, torch.tensor([0.5]), torch.float32)), codes)
    outside = latent[codes != 0].abs()
    assert (outside > 0.25).all() and (latent[codes == 0].abs() < 0.25).all()


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.granularity)
def test_gradients_pass_straight_through(grid):
    module, ternary, _ = linear_of(grid)
    module.train()
    module.share = 0.4
    x, upstream = torch.randn(5, 64), torch.randn(5, 24)
    (module(x) * upstream).sum().backward()
    full = upstream.T @ x
    torch.testing.assert_close(module.weight.grad, full)
    codes, _ = taken_apart(ternary, grid_of(ternary))
    parts = {"tensor": (24 * 64,), "row": (64,), "group": (32,)}[grid.granularity]
    torch.testing.assert_close(module.ternary_scale.grad, 0.4 * (full * codes).view(-1, *parts).sum(-1))


def test_the_share_grows_over_the_first_part_of_the_run():
    shares = [coarse_share(Distill(ternary_warmup=0.5), reached) for reached in (0, 0.25, 0.5, 0.75, 1)]
    assert shares == [0, 0.5, 1, 1, 1]
    assert coarse_share(Distill(ternary_warmup=0), 0) == 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gemma2"])
@pytest.mark.parametrize("mode", ["global", "local"])
def test_it_heals_and_the_result_is_exactly_ternary(tmp_path, family, mode):
    case = case_of(tmp_path, (Ternary(method="round"),), family=family)
    transposed = case.parent.family.transposed
    names, before = ternary_in(case.weights, transposed), kl_of(case, case.weights)
    assert len(names) in (24, 42)
    made = distill(case, settings_of(mode=mode, steps=60, ternary_warmup=0.2, learning_rate=1e-3))
    weights = overlay(case.weights, made.files)
    assert kl_of(case, weights) < 0.8 * before
    assert ternary_in(weights, transposed) == names and not any("ternary_scale" in name for name in made.files)
    assert any(not torch.equal(weights[name], case.weights[name]) for name in names), "codes or scales moved"
    changed = [(torch.sign(weights[n]) != torch.sign(case.weights[n])).float().mean().item() for n in names]
    assert 0 < max(changed) < 0.5
    for name in names:
        assert torch.equal(weights[name].half().to(weights[name].dtype), weights[name])


@pytest.mark.parametrize("grid", [{}, {"granularity": "row"}, {"granularity": "group", "group_size": 32}])
def test_bfloat16_checkpoints_of_every_granularity(tmp_path, grid):
    step = Ternary(method="round", layers=(2,), **grid)
    case = case_of(tmp_path, (step,), dtype=torch.bfloat16)
    made = distill(case, settings_of(train="changed", steps=10))
    weights = overlay(case.weights, made.files)
    names = ternary_in(case.weights)
    assert len(names) == 7 and ternary_in(weights) == names
    for name in names:
        assert weights[name].dtype == torch.bfloat16
        wide = weights[name].shape[1] > 32
        assert grid_of(weights[name]).granularity == (step.granularity if wide or not step.group_size else "row")
    assert {name.split(".")[2] for name in made.files} == {"2"}


def test_the_evaluation_is_that_of_the_ternary_weights(tmp_path):
    case = case_of(tmp_path, FFNS)
    made = distill(case, settings_of(evaluations=2))
    judged = made.trainings[0][1].judged
    held = case.held_out.shape[1] - 1

    def kl(weights):
        from llmsurgeon.walk.runner import LayerRunner
        from llmsurgeon.walk.variants import Variant
        from llmsurgeon.walk.walk import walk

        student = LayerRunner(case.config, weights, torch.float32)
        with torch.no_grad():
            p, q = (
                torch.stack([r.final(row)[:held] for row in walk(r, case.held_out, [Variant()])[0]]).log_softmax(-1)
                for r in (case.parent, student)
            )
        return (p.exp() * (p - q)).sum(-1).mean().item()

    assert kl(case.weights) == pytest.approx(judged[0]["kl"], rel=1e-4), "before: the student as it came"
    best = min(judged, key=lambda entry: entry["value"])
    assert kl(overlay(case.weights, made.files)) == pytest.approx(best["kl"], rel=1e-4)


@pytest.mark.parametrize("mode", ["global", "local"])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, monkeypatch, mode):
    settings = settings_of(mode=mode, steps=12, save_steps=4, evaluations=2)
    whole = distill(case_of(tmp_path / "whole", FFNS), settings)
    step, calls = Trainer._step, []

    def interrupted(self, reached):
        calls.append(reached)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return step(self, reached)

    monkeypatch.setattr(Trainer, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distill(case_of(tmp_path / "killed", FFNS), settings)
    monkeypatch.setattr(Trainer, "_step", step)
    case = case_of(tmp_path / "killed", FFNS)
    resumed = distill(case, settings)
    a, b = (overlay(case.weights, made.files) for made in (whole, resumed))
    assert set(whole.files) == set(resumed.files)
    assert all(torch.equal(a[name], b[name]) for name in case.weights)
    losses = [[line["loss"] for line in made.log if "loss" in line] for made in (whole, resumed)]
    assert losses[0] == losses[1]


def test_latent_weights_start_at_the_parents_layer(tmp_path):
    """Where blocks went the numbers of layers differ; what was fused has no parent of its shape."""
    steps = (PruneAttention(layers=(2, 3)), FuseFFN(runs=((1, 2, 3),)), Ternary(method="round", linears="ffn"))
    case = case_of(tmp_path, steps)
    model = build_student(case, settings_of(), torch.float32)
    latents = {name: m for name, m in model.named_modules() if isinstance(m, LatentLinear)}
    assert len(latents) == 3 * len(case.spec.layers)
    name = "model.layers.2.mlp.up_proj"
    theirs = case.parent.weights["model.layers.4.mlp.up_proj.weight"]
    assert ((latents[name].weight - theirs).abs() < 1e-6).float().mean() > 0.8
    fused = latents["model.layers.1.mlp.up_proj"].weight
    assert torch.equal(fused, case.weights["model.layers.1.mlp.up_proj.weight"])


def test_a_ternary_head_trains_and_a_ternary_embedding_stays(tmp_path):
    case = case_of(tmp_path, (Ternary(method="round", layers=(1,), head=True, embeddings=True),))
    made = distill(case, settings_of(steps=10))
    weights = overlay(case.weights, made.files)
    assert ternary_in(weights) == ternary_in(case.weights)
    assert "lm_head.weight" in made.files and "model.embed_tokens.weight" not in made.files


def test_adapters_on_ternary_linears_are_refused(tmp_path):
    case = case_of(tmp_path, FFNS)
    with pytest.raises(SurgeryError, match=r"model\.layers\.1\.mlp\.\w+ is ternary, and an adapter"):
        distill(case, settings_of(lora=Lora(rank=4)))
    made = distill(case, settings_of(lora=Lora(rank=4, targets=("q_proj", "v_proj")), steps=6))
    assert ternary_in(overlay(case.weights, made.files)) == ternary_in(case.weights)


def test_packing_leaves_other_trainings_alone(tmp_path):
    case = case_of(tmp_path)
    _, training = distill(case, settings_of(steps=4, evaluations=0)).trainings[0]
    assert packed(training, lambda name: torch.float32, False) == training
    assert json.loads((tmp_path / "result.json").read_text())["file"] == training.file
    assert not ternary_in(dict(tiny_model("llama").state_dict()))
