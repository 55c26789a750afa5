"""Perplexity, KL and top-1 agreement against the naive computation over all logits at once."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import tiny_model
from torch.nn import functional as F

from llmsurgeon.errors import SurgeryError
from llmsurgeon.evaluation.agreement import kl_divergence, top1_agreement
from llmsurgeon.evaluation.decoders import evaluate_decoder, evaluate_hidden
from llmsurgeon.evaluation.perplexity import mean_interval, perplexity, t_quantile, token_losses

FAMILIES = ("llama", "gpt2")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(64, (7, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=FAMILIES)
def pair(request):
    """(model, parent): the model is the parent with noise on its weights, so that they agree on some tokens."""
    model, parent = tiny_model(request.param), tiny_model(request.param)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model, parent


def naive(model, parent, tokens):
    with torch.no_grad():
        log_q = model(tokens).logits[:, :-1].double().log_softmax(-1)
        log_p = parent(tokens).logits[:, :-1].double().log_softmax(-1)
    targets = tokens[:, 1:, None]
    loss, parent_loss = (-x.gather(2, targets)[..., 0].mean().item() for x in (log_q, log_p))
    return {
        "perplexity": math.exp(loss),
        "parent_perplexity": math.exp(parent_loss),
        "perplexity_ratio": math.exp(loss) / math.exp(parent_loss),
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
        "top1_agreement": (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item(),
    }


def test_equals_the_naive_computation(pair, tokens):
    result = evaluate_decoder(pair[0], tokens, pair[1]).to_dict()
    for name, value in naive(*pair, tokens).items():
        assert result[name] == pytest.approx(value, rel=1e-5), name
    assert result["tokens"] == 7 * 23
    assert (result["sequences"], result["sequence_length"]) == (7, 24)


@pytest.mark.parametrize("chunk", [1, 5, 23, 1000])
def test_chunk_size_changes_nothing(pair, tokens, chunk):
    result, other = (evaluate_decoder(pair[0], tokens, pair[1], chunk=c).to_dict() for c in (chunk, 256))
    for name in ("perplexity", "kl", "top1_agreement", "perplexity_ratio"):
        assert result[name] == pytest.approx(other[name], rel=1e-6), name


def test_batch_size_changes_nothing(pair, tokens, monkeypatch):
    whole = evaluate_decoder(pair[0], tokens, pair[1])
    monkeypatch.setattr("llmsurgeon.evaluation.decoders.LOGIT_BYTES", 3 * 24 * 64 * 4)
    assert evaluate_decoder(pair[0], tokens, pair[1]).kl == pytest.approx(whole.kl, rel=1e-5)


def test_from_logits_a_sequence_at_a_time(pair, tokens):
    expected = evaluate_decoder(pair[0], tokens, pair[1]).to_dict()

    def logits_of(model):
        with torch.no_grad():
            return list(model(tokens).logits)

    result = evaluate_hidden(tokens, *(logits_of(model).__getitem__ for model in pair)).to_dict()
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, rel=1e-5), name
    alone = evaluate_hidden(tokens, logits_of(pair[0]).__getitem__)
    assert alone.perplexity == pytest.approx(expected["perplexity"]) and alone.kl is None


def test_a_model_against_itself(tokens):
    model = tiny_model("llama")
    result = evaluate_decoder(model, tokens, copy.deepcopy(model))
    assert result.kl == pytest.approx(0, abs=1e-6)
    assert (result.top1_agreement, result.perplexity_ratio) == (1.0, 1.0)
    assert result.perplexity_ratio_interval == (1.0, 1.0)
    assert result.top1_agreement_interval == (1.0, 1.0)


def test_two_windows_bound_kl_and_agreement_by_what_they_can_be():
    from llmsurgeon.evaluation.decoders import _against_parent

    means = {"loss": torch.tensor([3.0, 3.5]), "parent_loss": torch.tensor([2.9, 3.0])}
    means |= {"kl": torch.tensor([0.1, 0.5]), "top1": torch.tensor([0.9, 0.4])}
    assert mean_interval(means["kl"])[0] < 0 and mean_interval(means["top1"])[1] > 1
    found = _against_parent(means)
    assert found["kl_interval"][0] == 0 and found["kl_interval"][1] > 0.5
    assert found["top1_agreement_interval"] == (0.0, 1.0)


def test_every_figure_lies_in_its_interval(pair, tokens):
    result = evaluate_decoder(pair[0], tokens, pair[1]).to_dict()
    for name in ("perplexity", "parent_perplexity", "perplexity_ratio", "kl", "top1_agreement"):
        low, high = result[f"{name}_interval"]
        assert low < result[name] < high, name


def test_without_parent_and_with_one_sequence(tokens):
    result = evaluate_decoder(tiny_model("llama"), tokens[:1]).to_dict()
    assert result["perplexity"] > 1
    for name in ("perplexity_interval", "parent_perplexity", "kl", "kl_interval", "top1_agreement"):
        assert result[name] is None, name


def test_intervals_cover_the_truth_95_times_in_100():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(2000):
        low, high = mean_interval(3 + 2 * torch.randn(6, generator=generator, dtype=torch.float64))
        covered += low < 3 < high
    assert 0.93 < covered / 2000 < 0.97


def test_t_quantiles_fall_towards_the_normal_one():
    values = [t_quantile(n) for n in range(1, 400)]
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(1.966, abs=1e-3)
    assert t_quantile(60) == pytest.approx(2.000, abs=1e-3)


def test_pure_functions_against_torch():
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(9, 50, generator=generator) * 3 for _ in range(2))
    targets = torch.randint(50, (9,), generator=generator)
    torch.testing.assert_close(token_losses(q, targets, 4), F.cross_entropy(q, targets, reduction="none"))
    expected = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(kl_divergence(p, q, 4), expected)
    assert top1_agreement(p, p).tolist() == [1] * 9
    assert top1_agreement(p, -p).tolist() == [0] * 9
    assert math.isfinite(perplexity(1e6))


def test_nan_logits_are_an_error(tokens):
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5, 0] = float("nan")
    with pytest.raises(SurgeryError, match=r"^lm_head: tensor lm_head.weight holds NaN or infinity"):
        evaluate_decoder(model, tokens)


def test_models_and_tokens_that_do_not_fit(tokens):
    model = tiny_model("llama")
    with pytest.raises(SurgeryError, match=r"vocabulary of 64 tokens and its parent one of 70"):
        evaluate_decoder(model, tokens, tiny_model("llama", vocab_size=70))
    with pytest.raises(SurgeryError, match=r"token ids from 0 to 64, its vocabulary has 64"):
        evaluate_decoder(model, torch.tensor([[0, 64]]))
    with pytest.raises(SurgeryError, match=r"sequences of 129 tokens, its limit is 128; lower --seq-len"):
        evaluate_decoder(tiny_model("gpt2"), torch.zeros(1, 129, dtype=torch.long))
    with pytest.raises(SurgeryError, match=r"at least 1 by 2"):
        evaluate_decoder(model, torch.zeros(3, 1, dtype=torch.long))
