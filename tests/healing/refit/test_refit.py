"""The closed-form refit: its maths against least squares, its effect against the parent on fresh tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILY_NAMES, tiny_model
from operations.helpers import FALCON_7B, logits, operate, some_tokens, subject_of, taken
from safetensors import safe_open

from llmsurgeon.checkpoint.transform import TransformedWeights
from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats.configs import normalised
from llmsurgeon.formats.write import write_config
from llmsurgeon.healing.batches import Batches
from llmsurgeon.healing.refit.context import Context, RefitOptions, weighted, weights_in
from llmsurgeon.healing.refit.projection import OutputProjection
from llmsurgeon.healing.refit.refit import refit
from llmsurgeon.healing.refit.ridge import Moments, best_update, ridge_solution
from llmsurgeon.healing.spans import changed, spans
from llmsurgeon.healing.store import LayerStore, overlay
from llmsurgeon.operations.fuse_ffn import FuseFFN
from llmsurgeon.operations.parallel_blocks import ParallelBlocks
from llmsurgeon.operations.prune_attention import PruneAttention
from llmsurgeon.operations.prune_blocks import PruneBlocks
from llmsurgeon.operations.prune_ffn import PruneFFN
from llmsurgeon.operations.prune_heads import PruneHeads
from llmsurgeon.operations.prune_kv_heads import PruneKVHeads
from llmsurgeon.operations.prune_width import PruneWidth
from llmsurgeon.walk.runner import LayerRunner
from llmsurgeon.walk.variants import Variant
from llmsurgeon.walk.walk import walk

DROP, FUSE = PruneAttention(layers=(2, 3)), FuseFFN(runs=((1, 2, 3),))


def rows(tokens, features, outputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(tokens, features, generator=generator)
    x = torch.randn(features, outputs, generator=generator)
    return a, a @ x + 0.1 * torch.randn(tokens, outputs, generator=generator)


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 10.0])
def test_ridge_solution_is_least_squares_on_augmented_rows(ridge):
    a, r = rows(50, 8, 3)
    penalty = ridge * (a.T @ a).diagonal().mean()
    augmented = torch.cat([a, penalty.sqrt() * torch.eye(8)])
    expected = torch.linalg.lstsq(augmented, torch.cat([r, torch.zeros(8, 3)])).solution
    torch.testing.assert_close(ridge_solution(a.T @ a, a.T @ r, ridge), expected, atol=1e-4, rtol=1e-4)


def test_groups_are_damped_by_their_own_mean():
    a, r = rows(50, 8, 3)
    a[:, :3] *= 100
    gram = a.T @ a
    means = torch.cat([gram.diagonal()[:3].mean().expand(3), gram.diagonal()[3:].mean().expand(5)])
    augmented = torch.cat([a, (0.1 * means).sqrt().diag()])
    expected = torch.linalg.lstsq(augmented.double(), torch.cat([r, torch.zeros(8, 3)]).double()).solution.float()
    torch.testing.assert_close(ridge_solution(gram, a.T @ r, 0.1, (3, 5)), expected, atol=1e-4, rtol=1e-3)


def test_a_singular_system_still_has_a_solution():
    a, r = rows(4, 8, 3)
    a = torch.cat([a, a], dim=1)
    found = ridge_solution(a.T @ a, a.T @ r, 1e-9)
    torch.testing.assert_close(a @ found, r, atol=1e-2, rtol=1e-2)


def test_gram_matrices_are_summed_in_blocks(monkeypatch):
    monkeypatch.setattr("llmsurgeon.healing.refit.symmetric.COLUMNS", 3)
    (a, r), (b, s) = rows(20, 8, 2), rows(9, 8, 2, seed=1)
    moments = Moments()
    for features, residual in ((a, r), (b, s)):
        moments.add(features, residual, False)
    moments.add(b, s, True)
    both = torch.cat([a, b])
    moments.complete()
    torch.testing.assert_close(moments.fits.gram, both.T @ both)
    torch.testing.assert_close(moments.judges.gram, b.T @ b)
    torch.testing.assert_close(moments.fits.cross, both.T @ torch.cat([r, s]))


def test_held_out_error_is_the_error_on_the_held_out_rows():
    fit, judge = rows(40, 6, 2), rows(15, 6, 2, seed=1)
    moments = Moments()
    moments.add(*(t[:17] for t in fit), False)
    moments.add(*(t[17:] for t in fit), False)
    moments.add(*judge, True)
    update = ridge_solution(moments.fits.gram, moments.fits.cross, 0.1)
    a, r = judge
    direct = (r - a @ update).square().sum() / r.square().sum()
    assert moments.held_out_error(update) == pytest.approx(direct.item(), rel=1e-4)
    assert moments.held_out_error(torch.zeros_like(update)) == pytest.approx(1)


def test_the_ridge_that_errs_least_on_held_out_rows():
    a, r = rows(30, 6, 2)
    moments = Moments()
    moments.add(a, r, False)
    moments.add(*rows(30, 6, 2)[:2], True)
    candidates = (1e-3, 1.0, 100.0)
    update, ridge, error = best_update(moments, candidates)
    errors = {c: moments.held_out_error(ridge_solution(moments.fits.gram, moments.fits.cross, c)) for c in candidates}
    assert ridge == min(errors, key=errors.get) and error == errors[ridge] < 1
    # Rows that judge fit nothing.
    torch.testing.assert_close(update, ridge_solution(moments.fits.gram, moments.fits.cross, ridge))


def test_an_update_that_does_not_help_on_held_out_rows_is_not_made():
    """What fits is the opposite of what judges."""
    a, r = rows(30, 6, 2)
    moments = Moments()
    moments.add(a, r, False)
    moments.add(a, -r, True)
    assert best_update(moments, (1e-3, 0.1)) == (None, None, 1.0)


def test_states_that_are_not_finite_are_refused():
    a, r = rows(5, 6, 2)
    r[0, 0] = float("nan")
    with pytest.raises(SurgeryError, match="hidden states are not finite; run `llmsurgeon verify`"):
        Moments().add(a, r, False)


def prepared(model, *steps, tokens, store, held_out=4, batch=8, scores=None, **options):
    """What a refit of the model is given after the steps that its family takes; the student's config and weights."""
    subject, base, config = subject_of(model, scores)
    steps = taken(model, steps)
    parent_spec, weights = subject.spec, base
    for step in steps:
        plan = step.plan(subject)
        weights, subject = TransformedWeights(weights, plan.transforms), subject.after(plan)
    written = normalised(write_config(subject.spec, subject.family, config).config)
    mask = held_out
    if isinstance(held_out, int):
        mask = torch.arange(len(tokens)) % held_out == 0
    store.mkdir(exist_ok=True)
    context = Context(
        LayerRunner(config, base, model.dtype),
        LayerRunner(written, weights, model.dtype),
        parent_spec,
        subject.spec,
        Batches.of(tokens, mask, batch),
        RefitOptions(**options),
        LayerStore(store),
    )
    return context, written, weights


def kl_to(model, config, weights, tokens):
    """KL(parent || student) of the student with these weights, a nat a token."""
    runner = LayerRunner(config, weights, model.dtype)
    with torch.no_grad():
        student = runner.final(walk(runner, tokens, [Variant()])[0])
    p, q = (F.log_softmax(x.double(), -1) for x in (logits(model, tokens), student))
    return (p.exp() * (p - q)).sum(-1).mean().item()


def fresh(batch, length=16):
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(99))


STEPS = {
    "attention and fusing": (DROP, FUSE),
    "blocks": (PruneBlocks(layers=(2,)),),
    "an ffn": (PruneFFN(layers=(2,)),),
    "width": (PruneWidth(width=32, score="magnitude", layers=(2, 3)),),
    "width, then fusing": (PruneWidth(width=32, score="magnitude", layers=(2,)), DROP, FUSE),
    "parallel": (PruneBlocks(layers=(1,)), ParallelBlocks(windows=((3, 4),))),
}


# Where healing reads and writes other places than in the tiny family: a shared norm, norms behind the residual sums.
MODELS = (
    *((name, {}) for name in FAMILY_NAMES),
    ("falcon", FALCON_7B),
    ("opt", {"do_layer_norm_before": False}),
)


@pytest.mark.parametrize("what", STEPS)
@pytest.mark.parametrize(("family_name", "changes"), MODELS)
def test_it_lowers_the_divergence_on_fresh_tokens(family_name, changes, what, tmp_path):
    model, tokens = tiny_model(family_name, **changes), some_tokens(batch=64, length=16)
    context, config, weights = prepared(model, *STEPS[what], tokens=tokens, store=tmp_path / "store")
    before = kl_to(model, config, weights, fresh(16))
    made = refit(context)
    after = kl_to(model, config, overlay(weights, made.files), fresh(16))
    assert after < 0.99 * before, (before, after)
    assert any(update.accepted for update in made.updates)
    assert all(update.error_ratio <= 1 for update in made.updates)


def test_merged_kv_heads_are_refitted_too(tmp_path):
    model, tokens = tiny_model("llama"), some_tokens(batch=48, length=16)
    context, config, weights = prepared(model, PruneKVHeads(kv_heads=1), tokens=tokens, store=tmp_path / "store")
    before = kl_to(model, config, weights, fresh(16))
    assert kl_to(model, config, overlay(weights, refit(context).files), fresh(16)) < before


@pytest.mark.parametrize(
    "cut", [PruneHeads(heads=2, score="magnitude"), PruneKVHeads(kv_heads=1)], ids=lambda cut: cut.op
)
def test_heads_that_are_left_make_up_for_those_that_went(cut, tmp_path):
    """The output projection is the least-squares solution for what the parent's FFN read, whatever the FFN could do."""
    model, tokens = tiny_model("llama"), some_tokens(batch=48, length=16)
    step = cut.model_copy(update={"layers": (1,)})
    context, config, weights = prepared(model, step, tokens=tokens, store=tmp_path / "store", ridges=(1e-7,))
    made = refit(context)
    assert {update.projection for update in made.updates if update.layer == 1} == {
        "self_attn.o_proj",
        "mlp.down_proj",
    }
    tokens, fits = context.batches.tokens, ~context.batches.held_out
    wanted = behind_attention(model.config.to_dict(), subject_of(model)[1], tokens, 1)
    entered, read = behind_attention(config, weights, tokens, 1, reads=True)
    counts = weights_in(wanted)[fits].reshape(-1, 1)
    missing, read = ((values[fits].flatten(0, 1) * counts).double() for values in (wanted - entered, read))
    solution = torch.linalg.lstsq(read, missing).solution.T
    found = overlay(weights, made.files)["model.layers.1.self_attn.o_proj.weight"]
    torch.testing.assert_close(found.double(), solution, atol=1e-3, rtol=1e-3)


def behind_attention(config, weights, tokens, layer, reads=False):
    """The stream behind a layer's attention [S, T, D]; or the one in front, and what its output projection reads."""
    runner, seen = LayerRunner(config, weights, torch.float32), []
    x = runner.embed(tokens)
    with torch.no_grad():
        for index in range(layer):
            with runner.loaded(index):
                x = runner.whole(index, x)
        with runner.loaded(layer) as module:
            module.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
            behind = x + runner.attend(layer, x)
    return (x, seen[0]) if reads else behind


def test_massive_first_tokens_do_not_decide_the_fit(tmp_path, monkeypatch):
    """Windows of two sources begin with tokens of two kinds, each far larger in the stream than all others."""
    model, tokens = tiny_model("llama"), some_tokens(batch=48, length=16).clamp(min=2)
    tokens[:, 0] = torch.arange(len(tokens)) % 2
    with torch.no_grad():
        embedding, mlp = model.model.embed_tokens.weight, model.model.layers[1].mlp
        embedding[1] = embedding[0] + 0.3 * embedding[1]
        first = embedding[0]
        mlp.gate_proj.weight[0] = mlp.up_proj.weight[0] = 6 * first / first.norm()
        mlp.down_proj.weight[:, 0] *= 100
        sizes = model.model(input_ids=tokens, output_hidden_states=True).hidden_states[2].norm(dim=-1)
    assert (sizes[:, 0] > 4 * sizes[:, 1:].median()).all()

    def error(name):
        context, config, weights = prepared(model, PruneBlocks(layers=(1,)), tokens=tokens, store=tmp_path / name)
        made = overlay(weights, refit(context).files)
        judged = context.batches.tokens[context.batches.held_out]
        _, base, parents = subject_of(model)
        ends = [
            walk(LayerRunner(how, what, model.dtype), judged, [Variant()])[0].float()[:, 1:]
            for how, what in ((parents, base), (config, made))
        ]
        return ((ends[0] - ends[1]).square().sum(-1) / ends[0].square().sum(-1)).mean().item()

    fitted = error("weighted")
    for module in ("output", "join"):
        monkeypatch.setattr(
            f"llmsurgeon.healing.refit.{module}.weights_in", lambda stream: stream.new_ones(stream.shape[:2])
        )
    assert fitted < 0.9 * error("alike")


def test_what_tokens_count_rounds_no_number():
    stream = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    stream[0, 0] *= 1000
    counts = weights_in(stream)
    assert torch.equal(counts.log2(), counts.log2().round()) and counts.max() == 1 and counts[0, 0] < 0.01
    rows = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).bfloat16()
    made = weighted(rows, counts.reshape(-1, 1))
    assert made.dtype == torch.bfloat16
    assert torch.equal(made.float(), rows.float() * counts.reshape(-1, 1))
    assert weighted(rows.half(), counts.reshape(-1, 1)).dtype == torch.float32


def test_the_parent_is_left_as_it_was(tmp_path):
    model = tiny_model("llama")
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    context, _, _ = prepared(model, DROP, FUSE, tokens=some_tokens(batch=8, length=8), store=tmp_path / "store")
    refit(context)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())


def test_only_changed_tensors_are_stored_and_layers_before_the_cut_stay(family_name, tmp_path):
    model, tokens = tiny_model(family_name), some_tokens(batch=16, length=16)
    context, _, weights = prepared(model, DROP, FUSE, tokens=tokens, store=tmp_path / "store")
    files = refit(context).files
    healed = overlay(weights, files)
    family = context.family
    assert files and not any(name.startswith(family.layer(0)) for name in files)
    for name in weights:
        assert torch.equal(healed[name], weights[name]) == (name not in files), name
        assert healed[name].dtype == weights[name].dtype
    stored = []
    for file in sorted((tmp_path / "store").glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            stored += list(opened.keys())
    assert len(stored) == len(files)


def test_nothing_is_fitted_where_nothing_changed(tmp_path):
    model = tiny_model("llama")
    context, _, _ = prepared(model, PruneBlocks(layers=(5,)), tokens=some_tokens(batch=8), store=tmp_path / "store")
    made = refit(context)
    assert {name.split(".")[2] for name in made.files} == {"4"}
    assert {update.layer for update in made.updates} == {4}


def test_without_align_and_join_only_the_changed_blocks_output_moves(tmp_path):
    model = tiny_model("llama")
    options = dict(tokens=some_tokens(batch=16), store=tmp_path / "store", align=False, join=False)
    context, _, _ = prepared(model, DROP, FUSE, **options)
    assert set(refit(context).files) == {"model.layers.1.mlp.down_proj.weight"}


@pytest.mark.parametrize("family_name", ["llama", "gpt_neox", "gemma2"])
@pytest.mark.parametrize(
    "steps", [(DROP, FUSE), (PruneBlocks(layers=(2,)),), (PruneFFN(layers=(1,)),)], ids=lambda s: s[0].op
)
def test_a_killed_refit_goes_on(family_name, steps, tmp_path):
    """Some blocks stored, the rest not: the outcome is bit for bit that of an uninterrupted one."""
    model, tokens = tiny_model(family_name), some_tokens(batch=16)
    whole, _, weights = prepared(model, *steps, tokens=tokens, store=tmp_path / "whole")
    uninterrupted = refit(whole)
    expected = overlay(weights, uninterrupted.files)
    for kept in (1, 2):
        store = tmp_path / f"kept-{kept}"
        store.mkdir()
        for file in sorted((tmp_path / "whole").iterdir())[:kept]:
            (store / file.name).write_bytes(file.read_bytes())
        (store / "layer-0004.partial").write_bytes(b"half")
        resumed, _, _ = prepared(model, *steps, tokens=tokens, store=store)
        made = refit(resumed)
        found = overlay(weights, made.files)
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert made.updates == uninterrupted.updates


def test_harmful_updates_are_refused(tmp_path):
    """One short sequence to fit on and many to judge, hardly damped: overfitting shows on the held-out ones."""
    model, tokens = tiny_model("llama"), some_tokens(batch=24, length=4)
    options = dict(ridges=(1e-7,), align_ridge=1e-7, join_ridge=1e-7, held_out=torch.arange(24) > 0, batch=4)
    context, _, _ = prepared(model, DROP, FUSE, tokens=tokens, store=tmp_path / "store", **options)
    parts = [(slice(0, 1), False), *((slice(i, min(i + 4, 24)), True) for i in range(1, 24, 4))]
    assert list(context.batches.parts) == parts
    made = refit(context)
    refused = [update for update in made.updates if not update.accepted]
    assert refused and all(update.ridge is None and update.error_ratio == 1 for update in refused)
    if len(refused) == len(made.updates):
        assert not made.files


def test_a_multiplier_is_part_of_the_linear_map():
    """What an update promises is what it does, where the family scales what its parts add."""
    layer = tiny_surgeon_layer("granite")
    projection = OutputProjection(layer, "mlp.down_proj", "", False)
    x = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0))
    update = 0.1 * torch.randn(96, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = layer.feed_forward(x)
        promised = projection.features() @ update
        projection.move(update)
        torch.testing.assert_close(layer.feed_forward(x)[0] - before[0], promised, atol=1e-5, rtol=1e-5)
    assert projection.factor == pytest.approx(0.4)


@pytest.mark.parametrize("family_name", ["gemma2", "olmo2"])
def test_behind_a_post_norm_an_update_is_kept_only_for_what_it_does(family_name, tmp_path, monkeypatch):
    """However good it looks to the linear fit, an update that makes the held-out error larger is taken back."""

    def huge(moments, ridges):
        return 100 * torch.ones(len(moments.fits.update(0.1)), moments.fits.update(0.1).shape[1]), ridges[0], 0.1

    monkeypatch.setattr("llmsurgeon.healing.refit.output.best_update", huge)
    options = dict(tokens=some_tokens(batch=16, length=8), store=tmp_path / "store", align=False, join=False)
    context, _, _ = prepared(tiny_model(family_name), PruneBlocks(layers=(2,)), **options)
    made = refit(context)
    assert made.files == {}
    assert [(each.projection, each.ridge, each.error_ratio) for each in made.updates] == [("mlp.down_proj", None, 1.0)]


def tiny_surgeon_layer(family_name):
    """Layer 0 of a tiny model in the surgeon form."""
    return operate(tiny_model(family_name), format="surgeon")[0].model.layers[0]


def test_spans_and_changed():
    subject, _, _ = subject_of(tiny_model("llama"))
    parent = subject.spec
    for step in (PruneBlocks(layers=(0, 4)), DROP, FUSE):
        subject = subject.after(step.plan(subject))
    spec = subject.spec
    assert [layer.parents for layer in spec.layers] == [(1, 2, 3), (5,)]
    assert spans(spec, 6) == [(0, 1, 2, 3, 4), (5,)]
    assert [changed(b, s, parent) for b, s in zip(spec.layers, spans(spec, 6), strict=True)] == [True, False]
    layer = parent.layers[2]
    assert not changed(layer, (2,), parent)
    assert changed(layer, (2, 3), parent)
    assert changed(replace(layer, attention=None), (2,), parent)
    assert changed(replace(layer, attention=replace(layer.attention, kv_heads=1)), (2,), parent)


def test_operated_models_of_the_tests_are_those_of_the_runner():
    """`prepared` and `operate` build the same student."""
    model, tokens = tiny_model("llama"), some_tokens()
    student, _, _ = operate(model, DROP, FUSE)
    subject, weights, config = subject_of(model)
    for step in (DROP, FUSE):
        plan = step.plan(subject)
        weights, subject = TransformedWeights(weights, plan.transforms), subject.after(plan)
    runner = LayerRunner(normalised(write_config(subject.spec, subject.family, config).config), weights, model.dtype)
    with torch.no_grad():
        torch.testing.assert_close(runner.final(walk(runner, tokens, [Variant()])[0]), logits(student, tokens))


@pytest.mark.parametrize("size", [3, 512, 700, 1100])
def test_the_gram_matrix_is_worked_on_in_place_and_left_as_it_was(size):
    """The solution against float64; a view, as the joint fit takes one; nothing of the matrix has moved."""
    torch.manual_seed(0)
    features, residual = torch.randn(3 * size, size) * torch.rand(size), torch.randn(3 * size, 5)
    gram = features.T @ features
    gram = gram.triu() + gram.triu(1).T
    before, cross = gram.clone(), features.T @ residual
    for skip in (0, size // 3):
        own, sums = gram[skip:, skip:], cross[skip:]
        found = ridge_solution(own, sums, 0.1)
        damped = own.double() + 0.1 * own.double().diagonal().mean() * torch.eye(size - skip, dtype=torch.float64)
        expected = torch.linalg.solve(damped, sums.double())
        assert (found - expected).norm() < 1e-5 * expected.norm()
        assert torch.equal(gram, before)


def test_a_gram_matrix_that_cannot_be_factored_is_left_as_it_was_too():
    a, r = torch.randn(5, 900), torch.randn(5, 2)
    gram = a.T @ a
    gram = gram.triu() + gram.triu(1).T
    before = gram.clone()
    found = ridge_solution(gram, a.T @ r, 1e-12)
    assert torch.isfinite(found).all() and torch.equal(gram, before)


def test_one_matrix_is_as_much_as_is_taken_beside_the_sums():
    """Neither mirroring nor solving makes another of its size: peak memory of torch's own allocations."""
    torch.manual_seed(0)
    moments, size = Moments(), 1500
    for held in (False, True):
        moments.add(torch.randn(1600, size), torch.randn(1600, 4), held)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        best_update(moments.complete(), (0.1, 0.3))
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 4 * size * size / 2


def test_what_a_refit_takes_is_in_the_plan():
    from llmsurgeon.operations.fit_memory import Text, refit_bytes, regression_bytes

    subject, _, _ = subject_of(tiny_model("llama", intermediate_size=4096))
    student = subject
    for step in (PruneAttention(layers=(2, 3)), FuseFFN(runs=((1, 2, 3),))):
        student = student.after(step.plan(student))
    text = Text(16384, 16, 4, 0.125)
    found = refit_bytes(subject.spec, student.spec, text)
    assert regression_bytes(3 * 4096, 32, text) < found < 1.2 * regression_bytes(3 * 4096, 32, text)
    assert refit_bytes(subject.spec, subject.spec, text) == 0
    # One Gram matrix, where the tokens that judge are fewer than the channels; none, where those that fit are, too.
    assert 4 * 12288**2 < regression_bytes(12288, 32, text) < 1.3 * 4 * 12288**2
    assert regression_bytes(12288, 32, Text(4096, 16, 2, 0.125)) < 0.4 * 4 * 12288**2
