"""The losses against what they are by definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from healing.distill.test_distill import cache, case_of, settings_of  # noqa: F401 - a fixture

from llmsurgeon.healing.distill.distill import distill
from llmsurgeon.healing.distill.divergence import TopTokens, chunked_kl, cosine_distance, kl_rows, normalised_mse
from llmsurgeon.healing.distill.losses import LOSSES, Loss, weights_of
from llmsurgeon.healing.distill.targets import largest
from llmsurgeon.healing.distill.whole import wanted_of
from llmsurgeon.operations.distill import Distill, Trees

T, D, V = 23, 8, 40


def case(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, D, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, generator=generator, dtype=dtype, requires_grad=True)
    bias = torch.randn(V, generator=generator, dtype=dtype, requires_grad=True)
    parent = 2 * torch.randn(T, V, generator=generator, dtype=dtype)
    return hidden, weight, bias, parent


def top_of(parent, k):
    log_p, ids = parent.log_softmax(-1).topk(k)
    return TopTokens(ids, log_p)


def cells(logits, ids):
    """Probabilities of the named tokens, and of all others together."""
    named = logits.softmax(-1).gather(-1, ids)
    return torch.cat([named, 1 - named.sum(-1, keepdim=True)], dim=-1)


@pytest.fixture(params=[1, 3, 1000])
def compared(request, monkeypatch):
    """However few rows are compared at a time."""
    monkeypatch.setattr("llmsurgeon.healing.distill.divergence.COMPARED_ON_CPU", request.param * V)


@pytest.mark.usefixtures("compared")
@pytest.mark.parametrize("chunk", [5, 23, 100])
def test_chunked_kl_is_kl_div_with_its_gradients(chunk):
    hidden, weight, bias, parent = case(dtype=torch.float32)
    head = lambda h: F.linear(h, weight, bias)  # noqa: E731
    naive = F.kl_div(head(hidden).log_softmax(-1), parent.softmax(-1), reduction="batchmean")
    wanted = torch.autograd.grad(3 * naive, [hidden, weight, bias])
    found = chunked_kl(hidden, head, (weight, bias), lambda rows: parent[rows], chunk)
    torch.testing.assert_close(found, naive)
    (3 * found).backward()
    for tensor, gradient in zip((hidden, weight, bias), wanted, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.usefixtures("compared")
@pytest.mark.parametrize("k", [1, 4, V - 1])
def test_top_kl_is_the_kl_of_the_cells_with_its_gradients(k):
    hidden, weight, _, parent = case(dtype=torch.float32)
    head, top = (lambda h: F.linear(h, weight)), top_of(parent, k)
    p, q = cells(parent, top.ids), cells(head(hidden), top.ids)
    naive = (p * (p / q).log()).sum(-1).mean()
    wanted = torch.autograd.grad(naive, [hidden, weight])
    found = chunked_kl(hidden, head, (weight,), lambda rows: TopTokens(top.ids[rows], top.log_p[rows]), 7)
    torch.testing.assert_close(found, naive, atol=1e-5, rtol=1e-4)
    found.backward()
    for tensor, gradient in zip((hidden, weight), wanted, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, atol=1e-5, rtol=1e-3)


def test_all_of_the_vocabulary_as_top_tokens_is_the_full_kl():
    hidden, weight, _, parent = case()
    logits = F.linear(hidden, weight).detach()
    full, top = kl_rows(logits, parent), kl_rows(logits, top_of(parent, V))
    torch.testing.assert_close(top[0], full[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(top[1], full[1], atol=1e-4, rtol=1e-4)


def test_fewer_top_tokens_never_say_more():
    hidden, weight, _, parent = case()
    logits = F.linear(hidden, weight).detach()
    values = [kl_rows(logits, top_of(parent, k))[0].mean().item() for k in (1, 4, 16, V)]
    assert values == sorted(values)


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, _, parent = case(dtype=torch.float32)
    weight.requires_grad_(False)
    chunked_kl(hidden, lambda h: F.linear(h, weight), (weight,), lambda rows: parent[rows], 5).backward()
    assert weight.grad is None and hidden.grad.abs().sum() > 0


def test_the_parent_itself_costs_nothing():
    hidden, weight, _, _ = case(dtype=torch.float32)
    logits = F.linear(hidden, weight).detach()
    for target in (logits, top_of(logits, 5)):
        kl, slope = kl_rows(logits, target)
        assert kl.abs().max() < 1e-5 and slope.abs().max() < 1e-5


def test_no_logits_of_all_tokens_exist():
    hidden, weight, _, parent = case(dtype=torch.float32)
    seen = []

    def head(part):
        seen.append(len(part))
        return F.linear(part, weight)

    chunked_kl(hidden, head, (weight,), lambda rows: parent[rows], 5)
    assert max(seen) == 5 and sum(seen) == T


def test_cosine_and_normalised_mse():
    a, b = torch.randn(3, 4, D), torch.randn(3, 4, D)
    by_hand = [1 - (x @ y) / (x.norm() * y.norm()) for x, y in zip(a.view(-1, D), b.view(-1, D), strict=True)]
    assert cosine_distance(a, b).item() == pytest.approx(torch.stack(by_hand).mean().item(), abs=1e-6)
    assert cosine_distance(a, 5 * a).item() == pytest.approx(0, abs=1e-6)
    assert normalised_mse(torch.zeros_like(b), b).item() == pytest.approx(1)
    assert normalised_mse(b, b).item() == 0
    assert normalised_mse(a, b).item() == pytest.approx(((a - b) ** 2).sum().item() / (b**2).sum().item(), rel=1e-5)


def test_every_weight_that_a_recipe_sets_is_of_a_loss():
    """And of every loss a recipe can set the weight: as a field of its name, or of `trees`."""
    assert set(Distill.losses()) == set(LOSSES) - {"hardening"}
    step = Distill(**{name: 0.5 + place for place, name in enumerate(Distill.losses())}, trees=Trees(hardening=0.25))
    for name, loss in LOSSES.items():
        assert loss.weight(step) == (0.25 if name == "hardening" else getattr(step, name))
    assert set(weights_of(step, encoder=True)) == {"hidden", "pooled", "hardening"}
    assert set(weights_of(step, encoder=False)) == {"hidden", "cross_entropy", "kl", "hardening"}
    assert not set(weights_of(Distill(hidden=0.0), encoder=False)) & {"hidden", "hardening"}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_loss_is_a_function_and_a_line(tmp_path, monkeypatch, family):
    """It is asked for what it needs, counts with its weight, and stands in the log; nothing else knows of it."""

    def spread(seen):
        """Mean square of the student's hidden states at layer ends, relative to the parent's."""
        theirs = seen.answers["hidden"]
        return torch.stack([normalised_mse(end, theirs[:, place]) for place, end in enumerate(seen.ends)]).mean()

    case = case_of(tmp_path / "case", family=family)
    settings = settings_of(steps=2, evaluations=0, hidden=0.0, kl=0.5, hidden_layers=2)
    assert wanted_of(case, settings)[0] == ()
    monkeypatch.setitem(LOSSES, "spread", Loss(lambda step: 2.0, frozenset({"layer ends"}), spread, "Spread"))
    assert len(wanted_of(case, settings)[0]) == 2
    made = distill(case, settings)
    assert made.labels["spread"] == "Spread"
    for line in made.log:
        assert line["loss"] == pytest.approx(0.5 * line["kl"] + 2.0 * line["spread"], rel=1e-5)
        assert "hidden" not in line


@pytest.mark.parametrize("width", [7, 64, 65, 1000, 1003])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_the_largest_are_those_of_topk(width, k):
    values = torch.randn(50, width, generator=torch.Generator().manual_seed(width))
    found, places = largest(values, k)
    assert torch.equal(found, values.topk(k).values) and torch.equal(places, values.topk(k).indices)
    # Where numbers are alike, as those of 16 bits often are, any of them will do.
    alike = values.mul(2).round().bfloat16()
    found, places = largest(alike, k)
    assert torch.equal(found, alike.topk(k).values) and torch.equal(alike.gather(1, places), found)
    assert all(len(set(row)) == k for row in places.tolist())
