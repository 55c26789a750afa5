"""Scores of options against the slow way: the model really cut, really refitted in that layer, and run as a whole."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import LAYERS, tiny_model
from operations.helpers import logits, operate, some_tokens, subject_of
from safetensors.torch import load_file
from walk.test_walk import runner_of

from llmsurgeon.analysis.scores import compute_scores
from llmsurgeon.healing.refit.context import Context
from llmsurgeon.healing.refit.refit import refit
from llmsurgeon.healing.store import LayerStore
from llmsurgeon.searching.fitting import Workshop, fit_options
from llmsurgeon.searching.ground import Ground
from llmsurgeon.searching.options import combined, cuts, key_of, offered, stays, steps_of
from llmsurgeon.searching.scoring import Scorer
from llmsurgeon.searching.store import ScoreStore
from llmsurgeon.text.sequences import Sequences
from llmsurgeon.walk.runner import LayerRunner

OPS = ("prune_attention", "prune_ffn", "prune_blocks", "prune_kv_heads", "prune_heads", "prune_width", "fuse_ffn")


class Scene:
    """A tiny model with all of its options, and what scores them."""

    def __init__(self, folder, family, operations=OPS):
        self.model = tiny_model(family)
        self.runner = runner_of(self.model)
        subject, self.weights, self.config = subject_of(self.model)
        offers = offered(subject, 32, operations)
        steps = [step for offer in offers for step in offer.steps]
        fits, self.tokens = some_tokens(8, 24), some_tokens(4, 24)
        self.scores = compute_scores(steps, self.runner, fits, subject, batch=4)
        self.subject = subject_of(self.model, self.scores)[0]
        made = cuts(self.subject, self.weights, combined(LAYERS, offers))
        self.options = {(option.layers, option.name): option for cut in made for option in cut.options}
        self.ground = Ground.of(self.runner, Sequences(fits, ("text",) * len(fits)), self.tokens, batch=4)
        workshop = Workshop(self.config, self.subject.spec, self.ground, made)
        self.scorer = Scorer(self.ground, workshop, ScoreStore(folder), lambda: True)

    def measured(self, *names):
        """KL of the model with these options."""
        options = [self.options[name] for name in names]
        self.scorer.measure([options], "test")
        return self.scorer.known(options).kl

    def slow(self, folder, *names):
        """The same: each option cut, its layer refitted with nothing before it changed, and all put together."""
        options = [self.options[name] for name in names]
        steps = steps_of(options)
        whole, _, spec = operate(self.model, *steps, scores=self.scores, format="surgeon")
        # Its tensors are the parent's where nothing was cut.
        whole = copy.deepcopy(whole)
        state = whole.state_dict()
        prefix = self.runner.family.layer
        for place, option in enumerate(options):
            alone, written, mine = operate(self.model, *steps_of([option]), scores=self.scores, format="surgeon")
            student = LayerRunner(written.student, dict(alone.state_dict()), torch.float32)
            store = folder / str(place)
            store.mkdir()
            here = next((layer for layer in mine.layers if set(layer.parents) <= set(option.layers)), None)
            if here is None:  # gone, and nothing of it is left to fit
                continue
            how = fit_options(here, option.layers, self.subject.spec)
            shared = (self.subject.spec, mine, self.ground.fits, how, LayerStore(store))
            made = refit(Context(self.runner, student, *shared))
            for index, layer in enumerate(mine.layers):
                if set(layer.parents) <= set(option.layers):
                    stored = LayerStore(store).found(f"layer-{index:04d}")
                    assert stored.files.items() <= made.files.items()
                    at = next(i for i, each in enumerate(spec.layers) if each.parents == layer.parents)
                    for name, tensor in load_file(stored.file).items():
                        state[name.replace(prefix(index), prefix(at), 1)] = tensor
        whole.load_state_dict(state)
        at = list(range(self.tokens.shape[1] - 1, -1, -4))
        p, q = (F.log_softmax(logits(m, self.tokens)[:, at].double(), -1) for m in (self.model, whole))
        return float((p.exp() * (p - q)).sum(-1).mean())


CASES = {
    "llama": [
        [((2,), "no attention")],
        [((5,), "no FFN")],
        [((1,), "gone")],
        [((3,), "1 merged KV heads")],
        [((3,), "2 heads")],
        [((0,), "2 heads in 2 KV groups")],
        [((4,), "48 channels")],
        [((1, 2), "fused [1-2]")],
        [((2,), "no attention, 60 channels")],
        [((0,), "72 channels"), ((2, 3), "fused [2-3]"), ((5,), "2 heads, 48 channels")],
    ],
    "gpt_neox": [[((2,), "no attention")], [((4,), "48 channels"), ((5,), "no FFN")]],
    "gemma2": [[((3,), "1 merged KV heads")], [((1,), "no attention"), ((4,), "48 channels")]],
}


@pytest.mark.parametrize("family", CASES)
def test_scores_against_models_that_are_really_cut_and_refitted(tmp_path, family):
    scene = Scene(tmp_path / "store", family)
    for number, names in enumerate(CASES[family]):
        (tmp_path / str(number)).mkdir()
        slow = scene.slow(tmp_path / str(number), *names)
        assert scene.measured(*names) == pytest.approx(slow, rel=2e-3, abs=6e-8), names
        assert slow > 1e-6


def test_fits_lower_the_kl(tmp_path):
    """On text of its own, a fitted layer stands nearer to the parent than the cut alone."""
    scene = Scene(tmp_path / "store", "llama", ("prune_width",))
    cut = operate(scene.model, *scene.options[(3,), "24 channels"].offers[0].steps, scores=scene.scores)[0]
    at = list(range(scene.tokens.shape[1] - 1, -1, -4))
    p, q = (F.log_softmax(logits(m, scene.tokens)[:, at].double(), -1) for m in (scene.model, cut))
    assert scene.measured(((3,), "24 channels")) < float((p.exp() * (p - q)).sum(-1).mean())


def test_what_was_measured_is_not_measured_again(tmp_path):
    scene = Scene(tmp_path / "store", "llama", ("prune_width", "prune_attention"))
    names = ((2,), "no attention"), ((4,), "48 channels")
    found = scene.measured(*names)
    again = Scene(tmp_path / "store", "llama", ("prune_width",))
    key = key_of([scene.options[name] for name in names])
    assert float(again.scorer.store.found(key).double().mean()) == found
    assert again.scorer.known([stays(again.subject, 0)]).kl == 0


def test_a_search_out_of_time_measures_nothing_more(tmp_path):
    scene = Scene(tmp_path / "store", "llama", ("prune_width",))
    scene.scorer.in_time = lambda: False
    scene.scorer.measure([[option] for option in scene.options.values()], "test")
    assert scene.scorer.store.values == {}
