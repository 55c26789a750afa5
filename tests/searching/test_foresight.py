"""Options foreseen against options measured, and a search that foresees against one that measures everything."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from searching.test_scoring import Scene

from llmsurgeon.analysis.divergence import compared
from llmsurgeon.searching.foresight import Foresight

OPS = ("prune_attention", "prune_blocks", "prune_heads", "prune_kv_heads", "prune_width", "fuse_ffn")


def second_order(scene, option, size=1e-2):
    """Half of the variance of the logits' slope along what an option moves, by finite differences."""
    ground, runner = scene.ground, scene.ground.runner
    first, last = option.layers[0], option.layers[-1]

    def logits(hidden):
        for index in range(last + 1, len(runner.layers)):
            with runner.loaded(index):
                hidden = runner.whole(index, hidden)
        return torch.stack([runner.final(row[compared(len(row))]) for row in hidden]).double()

    with torch.no_grad():
        with scene.scorer.workshop.standing(option) as beside:
            moved = scene.scorer.workshop.through(option, beside, ground.scoring[first]) - ground.scoring[last + 1]
        here = ground.scoring[last + 1]
        slope = (logits(here + size * moved) - logits(here - size * moved)) / (2 * size)
        p = logits(here).softmax(-1)
        return ((p * slope**2).sum(-1) - (p * slope).sum(-1) ** 2).mean(-1) / 2


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_what_is_foreseen_is_the_second_order_of_the_kl(tmp_path, family):
    scene = Scene(tmp_path, family, OPS)
    foresight = Foresight(scene.ground, scene.scorer.workshop, draws=400)
    kinds = {option.offers[0].steps[-1].op: option for option in scene.options.values() if option.single}
    assert len(kinds) >= 4
    for option in kinds.values():
        exact, foreseen = second_order(scene, option), foresight.of(option)
        assert foreseen.shape == exact.shape
        assert foreseen.sum() == pytest.approx(float(exact.sum()), rel=0.25), option.name


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "stablelm"])
def test_options_rank_as_they_do_when_they_are_measured(tmp_path, family):
    """Where what an option changes is small, as fitted narrower FFNs are."""
    scene = Scene(tmp_path, family, ("prune_width", "prune_attention"))
    options = [option for option in scene.options.values() if option.single]
    scene.scorer.foresee(options, lambda: True)
    scene.scorer.measure([[option] for option in options], "test")
    foreseen, measured = (
        np.array([find(option).kl for option in options])
        for find in (scene.scorer.foreseen, lambda option: scene.scorer.known([option]))
    )
    clear = measured > 1e-6  # float32 tells less of it below
    assert (foreseen[~clear] < 3e-6).all()
    foreseen, measured = np.log(foreseen[clear]), np.log(measured[clear])
    assert len(measured) >= 20
    assert np.corrcoef(foreseen, measured)[0, 1] > 0.9
    assert abs(np.median(measured - foreseen)) < np.log(1.5)


def test_a_lot_is_kept_and_not_foreseen_again(tmp_path, monkeypatch):
    scene = Scene(tmp_path, "llama", ("prune_width",))
    options = [option for option in scene.options.values() if option.single]
    left = iter([True, False])
    scene.scorer.foresee(options, lambda: next(left))
    known = [option for option in options if scene.scorer.foreseen(option)]
    assert known == options[:8]
    again = Scene(tmp_path, "llama", ("prune_width",))
    seen = []
    of = Foresight.of
    monkeypatch.setattr(Foresight, "of", lambda self, option: (seen.append(option.name), of(self, option))[1])
    again.scorer.foresee([again.options[o.layers, o.name] for o in options], lambda: True)
    assert len(seen) == len(options) - 8
