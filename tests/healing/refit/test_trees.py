"""The refit of trees: its maths against one big least-squares problem, its effect on models of several families."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_encoder, tiny_model
from healing.refit.test_refit import kl_to
from operations.helpers import some_tokens, subject_of

from llmsurgeon.analysis.scores import compute_scores
from llmsurgeon.checkpoint.transform import TransformedWeights, WeightTransform
from llmsurgeon.formats.configs import normalised
from llmsurgeon.formats.write import write_config
from llmsurgeon.healing.batches import Batches
from llmsurgeon.healing.refit.context import Context, RefitOptions
from llmsurgeon.healing.refit.refit import refit
from llmsurgeon.healing.refit.trees import LeafSums, fit_leaves, fit_nodes, leaf_updates
from llmsurgeon.healing.store import LayerStore, overlay
from llmsurgeon.modeling.surgeon_fff import LeafFeedForward, NodeFeedForward
from llmsurgeon.operations.fff import FFF
from llmsurgeon.walk.runner import LayerRunner
from llmsurgeon.walk.variants import Variant
from llmsurgeon.walk.walk import walk


def test_updates_are_those_of_one_least_squares_problem():
    generator = torch.Generator().manual_seed(0)
    shared = [torch.randn(n, 3, generator=generator).double() for n in (30, 20)]
    own = [torch.randn(n, 4, generator=generator).double() for n in (30, 20)]
    missing = [torch.randn(n, 5, generator=generator).double() for n in (30, 20)]
    ridge = 0.1
    rows = torch.zeros(50, 11).double()
    rows[:, :3] = torch.cat(shared)
    rows[:30, 3:7], rows[30:, 7:] = own
    penalties = [sum((s.T @ s).diagonal().mean() * 0 + (s.T @ s).diagonal() for s in shared).mean()] * 3
    penalties += [(a.T @ a).diagonal().mean() for a in own for _ in range(4)]
    augmented = torch.cat([rows, (ridge * torch.stack(penalties)).sqrt().diag()])
    expected = torch.linalg.lstsq(augmented, torch.cat([*missing, torch.zeros(11, 5).double()])).solution
    common, updates = leaf_updates([LeafSums.of(*of) for of in zip(shared, own, missing, strict=True)], ridge)
    torch.testing.assert_close(torch.cat([common, *updates]), expected)


def test_without_shared_neurons_each_leaf_is_on_its_own():
    generator = torch.Generator().manual_seed(0)
    own = [torch.randn(n, 4, generator=generator) for n in (30, 20)]
    missing = [torch.randn(n, 5, generator=generator) for n in (30, 20)]
    empty = [a.new_zeros(len(a), 0) for a in own]
    leaves = [LeafSums.of(*of) for of in zip(empty, own, missing, strict=True)]
    _, updates = leaf_updates(leaves, 0.1)
    for leaf, update in zip(leaves, updates, strict=True):
        torch.testing.assert_close(update, leaf_updates([leaf], 0.1)[1][0])


@pytest.mark.parametrize("form", ["leaf", "node"])
def test_what_rows_can_make_up_for_is_made_up_for(form):
    """The missing part comes from other output rows of the same module: the fit finds it."""
    torch.manual_seed(0)
    if form == "leaf":
        module = LeafFeedForward(16, 2, "gelu", False, True, leaf_width=4, shared=3)
    else:
        module = NodeFeedForward(16, 2, "gelu", False, True, trees=2)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.5)
    module.eval()
    read = torch.randn(800, 16)
    held = torch.arange(800) % 8 == 0
    with torch.no_grad():
        before = module(read)
        writers = [p for name, p in module.named_parameters() if "down" in name or "out_bias" in name]
        kept = [p.clone() for p in writers]
        for p in writers:
            p.normal_(0, 0.5)
        missing = before - module(read)
        ridge, error = (fit_leaves if form == "leaf" else fit_nodes)(module, read, missing, held, (1e-6, 1.0))
        assert ridge == 1e-6 and error < 1e-4
        torch.testing.assert_close(module(read), before, atol=2e-2, rtol=2e-2)
        assert all((p - old).abs().max() < 0.2 for p, old in zip(writers, kept, strict=True))


def test_an_update_that_does_not_help_unseen_tokens_is_not_made():
    torch.manual_seed(0)
    module = LeafFeedForward(16, 1, "gelu", False, True, leaf_width=4, shared=3).eval()
    read = torch.randn(100, 16)
    held = torch.arange(100) >= 50
    read[50:] = read[:50]
    with torch.no_grad():
        before = {name: p.clone() for name, p in module.named_parameters()}
        missing = module(read)
        missing[50:] = -missing[:50]
        assert fit_leaves(module, read, missing, held, (1e-3, 0.1)) == (None, 1.0)
        assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


def refitted(model, step, tokens, store, fit=True, damage=()):
    """(config, weights) of the converted model, refitted or not; `damage` are edits of the student."""
    subject, base, config = subject_of(model)
    runner = LayerRunner(config, base, model.dtype)
    scores = compute_scores([step], runner, tokens, subject)
    subject = subject_of(model, scores)[0]
    plan = step.resolve(subject).plan(subject)
    weights = TransformedWeights(TransformedWeights(base, plan.transforms), damage)
    after = subject.after(plan)
    written = normalised(write_config(after.spec, after.family, config).config)
    if fit:
        held = torch.arange(len(tokens)) % 4 == 0
        store.mkdir(exist_ok=True)
        parent, student = LayerRunner(config, base, model.dtype), LayerRunner(written, weights, model.dtype)
        specs, text = (subject.spec, after.spec), Batches.of(tokens, held, 8)
        made = refit(Context(parent, student, *specs, text, RefitOptions(), LayerStore(store)))
        weights = overlay(weights, made.files)
        assert sum(update.accepted for update in made.updates) >= len(after.spec.layers) // 2
    return written, weights


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3"])
@pytest.mark.parametrize(
    "step",
    [FFF(depth=2, leaf_width=24, shared=16, min_tokens=16), FFF(form="node", depth=2)],
    ids=["leaf", "node"],
)
def test_a_refit_brings_the_model_nearer_on_unseen_tokens(tmp_path, family, step):
    model = tiny_model(family)
    tokens = some_tokens(64, 24)
    unseen = torch.randint(0, 64, (8, 24), generator=torch.Generator().manual_seed(9))
    raw = kl_to(model, *refitted(model, step, tokens, tmp_path, fit=False), unseen)
    healed = kl_to(model, *refitted(model, step, tokens, tmp_path / "store"), unseen)
    assert healed < 0.95 * raw


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.o_proj.weight", "encoder.layer.1.attention.output.dense.weight"]
)
def test_attention_behind_the_first_tree_is_brought_back_to_what_the_parent_read(tmp_path, name):
    """Of a pre-norm and a post-norm model: half an output projection grows, as far as tokens tell where to."""
    model = tiny_model("llama") if "o_proj" in name else tiny_encoder("bert")
    step = FFF(depth=0, leaf_width=96, layers=(0, 1))
    half = [WeightTransform((name,), (name,), lambda weight: weight / 2)]
    _, weights = refitted(model, step, some_tokens(64, 24), tmp_path / "store", damage=half)
    base = subject_of(model)[1]
    assert (weights[name] - base[name]).norm() < 0.45 * base[name].norm()


def test_encoders_are_fitted_before_their_norm(tmp_path):
    model = tiny_encoder("bert")
    tokens = some_tokens(64, 24)
    unseen = torch.randint(0, 64, (8, 24), generator=torch.Generator().manual_seed(9))
    step = FFF(depth=2, leaf_width=24, shared=16, min_tokens=16)
    _, base, config = subject_of(model)
    wanted = walk(LayerRunner(config, base, torch.float32), unseen, [Variant()])[0]

    def error(fit):
        written, weights = refitted(model, step, tokens, tmp_path / str(fit), fit=fit)
        return (walk(LayerRunner(written, weights, torch.float32), unseen, [Variant()])[0] - wanted).square().mean()

    assert error(True) < 0.8 * error(False)


def test_the_norm_behind_a_tree_is_fitted_too(tmp_path):
    """Gains that went wrong come back: of an FFN that is whole, exactly."""
    model, name = tiny_encoder("bert"), "encoder.layer.1.output.LayerNorm.weight"
    step = FFF(depth=0, leaf_width=96, layers=(0, 1))
    wrong = [WeightTransform((name,), (name,), lambda weight: weight * torch.linspace(0.5, 1.5, len(weight)))]
    _, weights = refitted(model, step, some_tokens(64, 24), tmp_path / "store", damage=wrong)
    torch.testing.assert_close(weights[name], subject_of(model)[1][name], atol=1e-4, rtol=1e-3)
