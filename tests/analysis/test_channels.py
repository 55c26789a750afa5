"""The order in which channels go, and what each width costs, against linear algebra on the activations themselves."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model
from operations.helpers import declared, some_tokens, taking
from walk.test_walk import runner_of

from llmsurgeon.analysis.channels import Moments, eliminate_channels
from llmsurgeon.analysis.elimination import AT_ONCE, DAMPING
from llmsurgeon.formats.configs import normalised
from llmsurgeon.model.families import family_of

FAMILIES = [case for case in taking("prune_width") if not declared(*case).encoder]


def seen_by(model, layer, tokens):
    """What enters an FFN's output projection [n, H], its rows [H, D], what leaves the layer [n, D]; float64."""
    family = family_of(normalised(model.config.to_dict()))
    block = model.get_submodule(family.layers)[layer]
    out = block.get_submodule(family.ffn_module(family.ffn_out))
    kept = {}
    hooks = [
        out.register_forward_pre_hook(lambda _, inputs: kept.update(active=inputs[0])),
        block.register_forward_hook(
            lambda _, inputs, output: kept.update(left=output[0] if isinstance(output, tuple) else output)
        ),
    ]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    down = out.weight if family.transposed else out.weight.T
    return kept["active"].flatten(0, -2).double(), down.detach().double(), kept["left"].flatten(0, -2).double()


def lost(gram, down, gone):
    """What is lost at least without these channels, the other rows free: the Schur complement of the others."""
    gone = torch.tensor(sorted(gone))
    others = torch.tensor([i for i in range(len(gram)) if i not in set(gone.tolist())])
    between = gram[gone][:, others]
    schur = gram[gone][:, gone] - between @ torch.linalg.solve(gram[others][:, others], between.T)
    return float((down[gone] * (schur @ down[gone])).sum())


@pytest.mark.parametrize(("family_name", "changes"), FAMILIES)
def test_against_linear_algebra(family_name, changes):
    model, tokens = tiny_model(family_name, **changes), some_tokens(batch=6, length=32)
    found = eliminate_channels(runner_of(model), tokens, {1, 4}, batch=4)
    assert set(found) == {1, 4}
    for layer, each in found.items():
        active, down, left = seen_by(model, layer, tokens)
        centred = active - active.mean(0)
        gram = centred.T @ centred / len(centred)
        gram.diagonal().add_(DAMPING * gram.diagonal().mean())
        spread = (left - left.mean(0)).square().sum(-1).mean()
        count, step = len(gram), max(1, int(len(gram) * AT_ONCE))
        order = each.order.argsort().tolist()
        assert sorted(each.order.tolist()) == list(range(count))
        assert each.loss[count] == 0 and (each.loss.diff() <= 1e-6).all(), "fewer channels lose more"
        for gone in range(step, count, step * 8):
            expected = lost(gram, down, order[:gone]) / spread
            assert float(each.loss[count - gone]) == pytest.approx(float(expected), rel=2e-2)
        # The first to go are those that cost least alone.
        alone = [lost(gram, down, [i]) for i in range(count)]
        cheapest = sorted(range(count), key=alone.__getitem__)[:step]
        assert sum(alone[i] for i in order[:step]) == pytest.approx(sum(alone[i] for i in cheapest), rel=1e-2)


def test_better_than_by_activation():
    """What it is for: a quarter of the channels gone loses less than those of least activation would."""
    model, tokens = tiny_model("llama"), some_tokens(batch=6, length=32)
    found = eliminate_channels(runner_of(model), tokens, set(range(6)))
    for layer, each in found.items():
        active, down, _ = seen_by(model, layer, tokens)
        centred = active - active.mean(0)
        gram = centred.T @ centred / len(centred)
        gram.diagonal().add_(DAMPING * gram.diagonal().mean())
        by_activation = (active.abs().mean(0) * down.norm(dim=1)).argsort()[:24].tolist()
        assert lost(gram, down, each.order.argsort()[:24].tolist()) < lost(gram, down, by_activation)


def test_moments_far_from_zero():
    rows = torch.randn(300, 5, generator=torch.Generator().manual_seed(0)) + 1000
    whole, spread = Moments(outer=True), Moments(outer=False)
    for part in rows.split(70):
        whole.add(part)
        spread.add(part)
    exact = rows.double()
    torch.testing.assert_close(whole.covariance().double(), exact.T.cov(correction=0), atol=1e-4, rtol=1e-3)
    assert spread.spread() == pytest.approx(float((exact - exact.mean(0)).square().sum(-1).mean()), rel=1e-3)
