"""Every score against hooks on whole models, one removal at a time."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import LAYERS, tiny_model
from operations.helpers import VARIANTS, logits, naive, skip, some_tokens, stream_of
from walk.test_walk import runner_of

from llmsurgeon.analysis import divergence, similarity
from llmsurgeon.analysis.divergence import divergences
from llmsurgeon.analysis.ffn_dependency import ffn_dependency
from llmsurgeon.analysis.measure import measure, parts_removed, sequences_for
from llmsurgeon.analysis.similarity import KLFrom, angular_distance, cosine
from llmsurgeon.formats.configs import normalised
from llmsurgeon.model.families import family_of

SEQUENCES = 16


def states(model, tokens):
    """Hidden states at every layer boundary [N + 1, S, T, D], and the logits."""
    family = family_of(normalised(model.config.to_dict()))
    layers = list(model.get_submodule(family.layers))
    entered, hooks = [], []
    for layer in layers:
        hooks.append(layer.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0].detach())))
    left = []
    hooks.append(layers[-1].register_forward_hook(lambda _, inputs, out: left.append(stream_of(out).detach())))
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return torch.stack([*entered, *left]), logits


def reads_of(model):
    family = family_of(normalised(model.config.to_dict()))
    return family.parallel_residual(model.config.to_dict())


def without(model, layer, part):
    """The parent without one part of one layer."""

    def no_ffn(x, parts):
        return x + parts.attention(layer, x)

    def no_attention(x, parts):
        return x + parts.ffn(layer, x)

    return naive(model, {layer: {"block": skip, "ffn": no_ffn, "attention": no_attention}[part]})


def kl(parent, student):
    """KL(parent || student) at every fourth position from the end, per sequence."""
    at = list(range(parent.shape[1] - 1, -1, -4))
    p, q = (F.log_softmax(x[:, at].double(), -1) for x in (parent, student))
    return (p.exp() * (p - q)).sum(-1).mean(1)


@pytest.fixture(params=VARIANTS, ids=lambda v: f"{v[0]}{'+' * bool(v[1])}")
def model(request):
    name, changes = request.param
    return tiny_model(name, **changes)


def test_every_score_is_the_slow_one(model):
    tokens = some_tokens(batch=SEQUENCES, length=12)
    found = measure(runner_of(model), tokens, batch=4)
    hidden, parent = states(model, tokens)
    contribution = hidden[1:] - hidden[:-1]
    blocks, few = 8, 2
    assert (blocks, few) == sequences_for(SEQUENCES)

    dependency = torch.full((LAYERS, LAYERS), float("nan"))
    for i in range(LAYERS):
        removed, logits = states(without(model, i, "block"), tokens[:blocks])
        block_kl = kl(parent[:blocks], logits)
        assert found.scores["block_kl"].mean[i] == pytest.approx(block_kl.mean().item(), rel=1e-3, abs=1e-6)
        for j in range(i + 1, LAYERS):
            moved = removed[j + 1] - removed[j]
            dependency[i, j] = (1 - F.cosine_similarity(contribution[j, :blocks], moved, dim=-1)).mean()
        for part in ("attention", "ffn"):
            _, logits = states(without(model, i, part), tokens[:few])
            expected = kl(parent[:few], logits).mean().item()
            assert found.scores[f"{part}_kl"].mean[i] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    torch.testing.assert_close(found.arrays["block_dependency"], dependency, atol=1e-4, rtol=1e-3, equal_nan=True)

    family, side_by_side = family_of(normalised(model.config.to_dict())), reads_of(model)
    layers = list(model.get_submodule(family.layers))
    attended, activations = sublayers(model, tokens)
    for i in range(LAYERS):
        x, attention = hidden[i], attended[i]
        ffn = contribution[i] - attention
        read = x if side_by_side else x + attention
        for name, before, after in (("attention", x, x + attention), ("ffn", read, read + ffn)):
            expected = F.cosine_similarity(before, after, dim=-1).mean().item()
            assert found.scores[f"{name}_similarity"].mean[i] == pytest.approx(expected, abs=1e-4)
        influence = 1 - F.cosine_similarity(hidden[i], hidden[i + 1], dim=-1).mean().item()
        assert found.scores["block_influence"].mean[i] == pytest.approx(influence, abs=1e-4)
        down = layers[i].get_submodule(family.ffn_module(family.ffn_out)).weight
        norms = (down.T if family.transposed else down).norm(dim=0)
        torch.testing.assert_close(
            found.arrays["ffn_channel"][i], activations[i].abs().mean((0, 1)) * norms, atol=1e-5, rtol=1e-3
        )
        for n in range(1, LAYERS + 1):
            distance = found.arrays["angular_distance"][n - 1, i]
            if i + n > LAYERS:
                assert distance.isnan()
                continue
            cos = F.cosine_similarity(hidden[i][:, -1], hidden[i + n][:, -1], dim=-1)
            assert distance.item() == pytest.approx((cos.arccos() / math.pi).mean().item(), abs=1e-4)


def test_removals_take_a_share_of_the_sequences():
    counts = {1: (1, 1), 2: (2, 2), 3: (3, 2), 8: (8, 2), 16: (8, 2), 24: (12, 3), 32: (16, 4), 128: (64, 16)}
    assert {count: sequences_for(count) for count in counts} == counts
    for count in range(8, 200):  # what one walk runs side by side must divide both
        blocks, few = sequences_for(count, batch=4)
        assert few <= blocks <= count and blocks % few == 0
        assert few <= 4 or few % 4 == 0


def sublayers(model, tokens):
    """Every layer's attention contribution and what enters its FFN's output projection."""
    family = family_of(normalised(model.config.to_dict()))
    attended, activations = {}, {}

    def watched(i):
        def compute(x, parts):
            attended[i] = parts.attention(i, x)
            return parts.block(i, x)

        return compute

    copied = naive(model, {i: watched(i) for i in range(LAYERS)})
    for i, stage in enumerate(copied.get_submodule(family.layers)):
        projection = stage.parts.layers[i].get_submodule(family.ffn_module(family.ffn_out))
        projection.register_forward_pre_hook(
            lambda _, x, i=i: activations.__setitem__(i, x[0].detach().view(*tokens.shape, -1))
        )
    logits(copied, tokens)
    return attended, activations


def test_batches_do_not_matter():
    model, tokens = tiny_model("llama"), some_tokens(batch=9, length=8)
    one, many = (measure(runner_of(model), tokens, batch=batch) for batch in (1, 8))
    for name, score in one.scores.items():
        assert many.scores[name].mean == pytest.approx(score.mean, rel=1e-3, abs=1e-6)
    for name, array in one.arrays.items():
        torch.testing.assert_close(many.arrays[name], array, equal_nan=True, atol=1e-5, rtol=1e-3)


def test_one_sequence_is_enough_but_has_no_interval():
    found = measure(runner_of(tiny_model("llama")), some_tokens(batch=1, length=8))
    assert all(value == value for value in found.scores["block_kl"].mean)
    assert all(value != value for value in found.scores["block_kl"].low)


def test_intervals_hold_the_mean():
    found = measure(runner_of(tiny_model("llama")), some_tokens(batch=8, length=8))
    for name in ("block_kl", "block_influence", "attention_similarity"):
        score = found.scores[name]
        assert all(low < mean < high for low, mean, high in zip(score.low, score.mean, score.high, strict=True)), name


@pytest.mark.parametrize("dropped", [frozenset(), frozenset({2, 3, 5})], ids=str)
@pytest.mark.parametrize("family_name", ["llama", "gpt_neox"])
def test_ffn_dependency(family_name, dropped):
    """FFN contributions with FFN i gone, where the attentions of `dropped` are gone already."""
    model, tokens = tiny_model(family_name), some_tokens(batch=3, length=10)
    side_by_side = reads_of(model)

    def contributions(gone):
        seen = {}

        def layer(j):
            def compute(x, parts):
                attended = x if j in dropped else x + parts.attention(j, x)
                seen[j] = parts.ffn(j, x if side_by_side else attended)
                return attended if j == gone else attended + seen[j]

            return compute

        with torch.no_grad():
            naive(model, {j: layer(j) for j in range(LAYERS)})(input_ids=tokens, use_cache=False)
        return seen

    whole = contributions(None)
    expected = torch.full((LAYERS, LAYERS), float("nan"))
    for i in range(LAYERS):
        removed = contributions(i)
        for j in range(i + 1, LAYERS):
            expected[i, j] = (1 - F.cosine_similarity(whole[j], removed[j], dim=-1)).mean()
    found = ffn_dependency(runner_of(model), tokens, dropped, batch=2)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3, equal_nan=True)


def test_the_promised_evaluations_are_those_made(monkeypatch):
    """The progress bar ends at its total: N for the parent and N(N+1)/2 for each group."""
    totals, done = [], []

    class Recorder:
        def __init__(self, what, total, unit):
            totals.append((what, total))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def advance(self, amount=1.0):
            done.append((totals[-1][0], amount))

    for module in ("measure", "divergence", "ffn_dependency"):
        monkeypatch.setattr(f"llmsurgeon.analysis.{module}.Progress", Recorder)
    tokens = some_tokens(batch=16, length=6)
    measure(runner_of(tiny_model("llama")), tokens, batch=4)
    ffn_dependency(runner_of(tiny_model("llama")), tokens, frozenset(), batch=4)
    half_square = LAYERS * (LAYERS + 1) // 2
    for what, total in totals:
        assert total == sum(amount for name, amount in done if name == what), what
    by_name = dict(totals)
    assert by_name["measure FFN dependencies"] == (LAYERS + half_square) * tokens.numel()
    assert by_name["measure dependencies and scores"] == (16 * LAYERS + 8 * half_square + 2 * 2 * half_square) * 6


def test_parts_removed():
    assert [(v.no_attention, v.no_ffn) for v in parts_removed(2, "block")] == [({0}, {0}), ({1}, {1})]
    assert [(v.no_attention, v.no_ffn) for v in parts_removed(2, "ffn")] == [(set(), {0}), (set(), {1})]
    assert [(v.no_attention, v.no_ffn) for v in parts_removed(2, "attention")] == [({0}, set()), ({1}, set())]


@pytest.mark.parametrize(("rows", "head_rows"), [([5, 5, 5], 4), ([5, 2, 3], 7), ([5, 1, 5], 256)])
def test_divergences_do_not_depend_on_how_rows_are_grouped(rows, head_rows, monkeypatch):
    """Against log-softmax in float64, one variant and one sequence at a time."""
    monkeypatch.setattr(divergence, "HEAD_ROWS", head_rows)
    runner = runner_of(tiny_model("llama"))
    torch.manual_seed(0)
    streams = torch.randn(3, 5, 10, 32)
    found = divergences(runner, streams, rows)
    with torch.no_grad():
        for variant, count in enumerate(rows):
            for sequence in range(5):
                if sequence >= count:
                    assert found[variant, sequence].isnan()
                    continue
                parent, mine = runner.final(streams[0, sequence]), runner.final(streams[variant, sequence])
                expected = kl(parent[None], mine[None]).item()
                assert found[variant, sequence].item() == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_kl_of_a_few_rows_at_a_time(monkeypatch):
    torch.manual_seed(0)
    parent, mine = torch.randn(7, 50) * 5 - 100, torch.randn(7, 50) * 5
    p, q = (F.log_softmax(x.double(), -1) for x in (parent, mine))
    expected = (p.exp() * (p - q)).sum(-1).float()
    for rows in (1, 3, 100):
        monkeypatch.setattr(similarity, "COMPARED_ON_CPU", rows * 50)
        torch.testing.assert_close(KLFrom(parent)(mine), expected)
        torch.testing.assert_close(KLFrom(parent)(mine[:4]), expected[:4])


def test_similarity_maths():
    a, b = torch.tensor([[1.0, 0], [0, 0]]), torch.tensor([[0.0, 2], [1, 1]])
    assert cosine(a, b).tolist() == [0, 0]
    assert angular_distance(a[0], b[0]).item() == pytest.approx(0.5)
    assert angular_distance(a[0], -a[0]).item() == pytest.approx(1)
    big = torch.full((4,), 3e4, dtype=torch.float16)
    assert cosine(big, big).item() == pytest.approx(1)
