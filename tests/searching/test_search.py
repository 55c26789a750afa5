"""The whole search on a tiny model: what it writes runs, what was killed goes on, and what cannot be is said."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from conftest import save_encoder
from safetensors.torch import load_file

from llmsurgeon import run as run_recipe
from llmsurgeon import search, verify
from llmsurgeon.engines.transformers import TransformersKind
from llmsurgeon.errors import SurgeryError
from llmsurgeon.evaluation.speed import Speedup
from llmsurgeon.planning.opened import open_model
from llmsurgeon.recipe.recipe import load, loads
from llmsurgeon.search import FILES, SCORING, Wanted, _Clock, _opened
from llmsurgeon.searching import scoring
from llmsurgeon.searching.costs.measured import SecondsMeter
from llmsurgeon.searching.seeking import Seeker
from llmsurgeon.searching.store import ScoreStore
from tests.prose import sentences

TEXT = {"text": "text.txt", "self_share": 0.0}
FEW = {"tokens": 128, "sequence_length": 32, **TEXT, "allow": ("prune_width", "prune_attention")}


@pytest.fixture
def scene(folder, monkeypatch):
    """The working folder, with a cache of its own and a text that is long enough."""
    monkeypatch.setenv("LLMSURGEON_CACHE", str(folder / "cache"))
    return folder


def test_the_recipe_makes_what_was_found(scene):
    found = search("parent", ["params=0.85x", "flops=0.8x"], "out", Wanted(**FEW))
    assert sorted(path.name for path in (scene / "out").iterdir() if not path.name.startswith("checksums.")) == sorted(
        FILES
    )
    report = json.loads((scene / "out" / "report.json").read_text())
    assert report["bounds"][0]["target"] == "params=0.85x" and report["options"]
    made = run_recipe(load(scene / "out" / "recipe.yaml"), None, "made")
    student = open_model("made")
    for bound, quantity in zip(found.bounds, ("parameters", "flops_per_token"), strict=True):
        really = getattr(made.planned.after, quantity)
        assert bound.predicted == bound.measured == really <= bound.budget < bound.parent
    chosen = {layer: each.name for each in found.layers for layer in each.layers}
    for layer in student.spec.layers:
        name = chosen[layer.parents[0]]
        assert (layer.attention is None) == ("no attention" in name)
        width = next((int(word.split()[0]) for word in name.split(", ") if "channels" in word), 96)
        assert layer.ffn.width == width


def test_the_recipe_runs_from_anywhere_though_the_model_lies_far_off(scene, monkeypatch):
    """The folder of a search is worked with, not passed on: its recipe names model and text as they lie from it."""
    (scene / "far" / "off").mkdir(parents=True)
    out = scene / "far" / "off" / "out"
    given = {**FEW, "text": scene / "text.txt"}
    search(scene / "parent", ["params=0.9x"], out, Wanted(**given))
    assert str(scene) not in (out / "recipe.yaml").read_text()
    monkeypatch.chdir(scene / "far")
    run_recipe(load(out / "recipe.yaml"), None, "made")
    assert (scene / "far" / "made" / "config.json").exists()


def weights(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("why", ["made", "time is up", "trained"])
def test_the_model_that_is_asked_for_is_what_the_recipe_makes(scene, monkeypatch, why):
    earlier = loads("version: 1\nsteps: [{op: prune_blocks, layers: [1]}]\n")
    run_recipe(earlier, "parent", "made")  # which is replaced
    if why == "trained":
        (scene / "text.txt").write_text("\n".join(sentences(400, seed=0)))
    if why == "time is up":
        some_time(monkeypatch, lots=3)
    made = []

    def briefly(recipe, *given):
        """Training by steps, which take no clock's word for when they end."""
        recipe = load(recipe)
        steps = [
            step.model_copy(update={"minutes": None, "steps": 2}) if step.trains else step for step in recipe.steps
        ]
        made.append(steps[-1])
        return run_recipe(recipe.model_copy(update={"steps": tuple(steps)}), *given)

    monkeypatch.setattr(sys.modules["llmsurgeon.search"], "run", briefly)
    wanted = Wanted(**FEW, heal=7 if why == "trained" else None)
    found = search("parent", "params=0.85x", "out", wanted, make="made", overwrite=True)
    assert len(made) == (why != "made")
    if why == "trained":
        assert made[0].sequence_length == 128 and load("out/recipe.yaml").steps[-1].minutes == 7
    recipe = (scene / "made" / "recipe.yaml").read_text()
    assert "model: ../parent" in recipe and "text: ../text.txt" in recipe
    assert not list(scene.glob("*.partial"))
    again = briefly("out/recipe.yaml", None, "again")
    assert open_model("made").spec.layers == again.planned.spec.layers
    assert found.bounds[0].predicted == again.planned.after.parameters
    assert verify("made") and (scene / "again" / "recipe.yaml").read_text() == recipe
    ours, theirs = weights(scene / "made"), weights(scene / "again")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("make", ["out", "out/model", "."])
def test_the_model_and_the_findings_have_folders_of_their_own(scene, make):
    with pytest.raises(SurgeryError, match=r"folders of their own|is the working folder"):
        search("parent", "params=0.85x", "out", Wanted(**FEW), make=make)
    assert not list(scene.glob("out*"))


def test_a_place_for_the_model_that_is_taken_is_said_first(scene):
    (scene / "made").mkdir()
    (scene / "made" / "mine").touch()
    with pytest.raises(SurgeryError, match="made: exists already"):
        search("parent", "params=0.85x", "out", Wanted(**FEW), make="made")
    assert not list(scene.glob("out*")) and (scene / "made" / "mine").exists()


def test_a_killed_search_goes_on_and_another_target_measures_little(scene, monkeypatch):
    whole = search("parent", "params=0.85x", "whole", Wanted(**FEW))
    monkeypatch.setenv("LLMSURGEON_CACHE", str(scene / "other"))
    kept, keep = [], ScoreStore.keep

    def dies(store, new):
        if kept:
            raise KeyboardInterrupt
        kept.append(sorted(new))
        keep(store, new)

    monkeypatch.setattr(ScoreStore, "keep", dies)
    with pytest.raises(KeyboardInterrupt):
        search("parent", "params=0.85x", "out", Wanted(**FEW))
    later = []
    monkeypatch.setattr(ScoreStore, "keep", lambda store, new: (later.append(sorted(new)), keep(store, new)))
    again = search("parent", "params=0.85x", "out", Wanted(**FEW))
    assert not {key for lot in later for key in lot} & set(kept[0])
    assert (scene / "out" / "recipe.yaml").read_text() == (scene / "whole" / "recipe.yaml").read_text()
    assert again.options == whole.options and again.points == whole.points
    scored = sum(map(len, later))
    later.clear()
    search("parent", "params=0.8x", "second", Wanted(**FEW))
    assert sum(map(len, later)) < scored / 2


def some_time(monkeypatch, lots, few=8):
    """Time for so many lots of a few options each, and for nothing after them."""
    left = [lots]

    def before(self, share):
        def in_time():
            left[0] -= 1
            return left[0] >= 0

        return in_time if share == SCORING else lambda: False

    monkeypatch.setattr(_Clock, "before", before)
    monkeypatch.setattr(scoring, "SIDE_BY_SIDE", few)
    monkeypatch.setattr(scoring, "FORESEEN_AT_ONCE", few)


def test_time_that_is_up_while_options_are_scored_ends_with_the_best_of_those(scene, monkeypatch):
    some_time(monkeypatch, lots=3)
    found = search("parent", ["params=0.85x", "flops=0.85x"], "out", Wanted(**FEW))
    unscored, unmeasured, unmade = found.notes[:3]
    assert "24 of" in unscored and "chosen options were not measured alone" in unmeasured
    assert "time was up before the model was made" in unmade
    assert {option.measured for option in found.options if option.kl} == {False}
    assert [bound.measured for bound in found.bounds] == [None, None]
    assert all(bound.predicted <= bound.budget for bound in found.bounds)
    (chosen,) = (point for point in found.points if point.chosen)
    assert chosen.kind == "measured" and chosen.kl > 0
    made = run_recipe(load(scene / "out" / "recipe.yaml"), None, "made")
    assert made.planned.after.parameters == found.bounds[0].predicted
    # Every layer has had its turn.
    assert {option.layers[0] for option in found.options if option.kl} == set(range(6))
    assert "time was up" in (scene / "out" / "report.html").read_text()


def test_time_that_is_up_before_anything_can_be_chosen_is_said(scene, run, monkeypatch):
    for lots, scored in ((0, 0), (1, 2)):
        some_time(monkeypatch, lots, few=2)
        few = ("--text", "text.txt", "--self-share", 0, "--seq-len", 32, "--tokens", 128, "--allow", "prune_width")
        code, _, err = run("search", "parent", "--target", "params=0.7x", *few, "-o", "out", "--minutes", 1)
        assert code == 2 and f"time was up when {scored} of 30 options were scored" in err
        assert "the others take about" in err and "kept" in err and not (scene / "out").exists()


def test_time_that_is_up_once_single_operations_stand_still_measures_what_scores_take_for_the_best(scene, monkeypatch):
    compare, seen = Seeker.compare, []

    def then_time_is_up(self, tightened):
        singles = compare(self, tightened)
        self.in_time = self.scorer.in_time = lambda: False
        seen.append((self, self._choice(self.scores(), tightened), {model.places for model in singles.values()}))
        return singles

    monkeypatch.setattr(Seeker, "compare", then_time_is_up)
    search("parent", ["params=0.87x", "kv=0.85x"], "out", Wanted(**FEW))
    [(seeker, likeliest, singles)] = seen
    assert singles and likeliest not in singles and seeker.models.keys() == {*singles, likeliest}


def test_the_model_is_timed_where_it_is_to_run(scene, monkeypatch):
    monkeypatch.setattr(sys.modules["llmsurgeon.search"], "chosen_device", lambda name: "meta")
    monkeypatch.setattr("llmsurgeon.engines.transformers.chosen_device", lambda name: name)
    of_engines = {"transformers": "meta", "llama.cpp:q8_0": "cpu"}
    for engine, device in of_engines.items():
        (meter,) = _opened("parent", "decode=1.2x", Wanted(engine=engine), print).meters
        assert meter.engine.setting.device == device


@pytest.mark.parametrize(("more", "times"), [(0.1, 1), (3.0, 3)])
def test_the_shape_that_is_chosen_is_timed_before_it_is_made(scene, monkeypatch, more, times):
    """An engine in which a model of three shapes of layers takes a tenth more than its parts; or so much that no such
    model meets a target, and what came nearest is told."""

    def seconds(spec):
        unlike = len({replace(layer, parents=()) for layer in spec.layers}) > 2
        return (
            1e-3
            * (1 + sum(1 + sum(ffn.width / 96 for ffn in layer.ffns) for layer in spec.layers))
            * (1 + unlike * more)
        )

    @contextmanager
    def timed(self, model, setting, steps):
        yield lambda: seconds(model.spec)

    def speedup(self, path, parent):
        return Speedup.of([seconds(open_model(str(parent)).spec) / seconds(open_model(str(path)).spec)])

    monkeypatch.setattr(TransformersKind, "timed", timed)
    monkeypatch.setattr(SecondsMeter, "speedup", speedup)
    said: list = []
    few = {**FEW, "allow": ("prune_width",), "tokens": 512}
    found = search("parent", "decode=1.2x", "out", Wanted(**few, engine="transformers"), say=said.append)
    (bound,) = found.bounds
    assert bound.predicted == pytest.approx(bound.measured, rel=0.01)
    assert 1 <= sum(line.startswith("made: ") for line in said) <= times
    met = bound.measured <= 1.01 * bound.budget
    assert met or more > 1
    assert ("missed by" in (scene / "out" / "report.html").read_text()) == (not met)


@pytest.mark.parametrize(
    ("targets", "wanted", "said"),
    [
        (["params=0.05x"], {}, "target params=0.05x is out of reach: .* the nearest is 0.[0-9]+x params"),
        (["params=1.2x"], {}, "leaves everything as it is"),
        (["colour=0.5x"], {}, "expected QUANTITY=VALUE"),
        ([], {}, "a search needs a target"),
        (["params=0.8x", "params=0.9x"], {}, "bound the same"),
        (["decode=1.2x"], {}, "name what is to be that fast"),
        (["params=0.8x"], {"allow": ("prune_nothing",)}, "'prune_nothing' is no operation"),
        (["params=0.8x"], {"allow": ("refit",)}, "offer nothing to choose among"),
        (["params=0.8x"], {"forbid": FEW["allow"]}, "no operation is left"),
        (["params=0.8x"], {"sequence_length": 128}, "too little text.*--text with at least 1,536 tokens"),
        (["params=0.8x"], {"engine": "tensorrt"}, "expected one of"),
    ],
)
def test_what_cannot_be_searched_is_said(scene, targets, wanted, said):
    (scene / "text.txt").write_text((scene / "text.txt").read_text()[:1000])
    with pytest.raises(SurgeryError, match=said):
        search("parent", targets, "out", Wanted(**{**FEW, **wanted}))
    assert not (scene / "out").exists()


def test_a_quarter_of_the_text_is_what_the_model_writes(scene):
    given = {"tokens": 128, "sequence_length": 16, "text": "text.txt", "allow": ("prune_attention",)}
    found = search("parent", "params=0.95x", "out", Wanted(**given))
    assert "sampled from the model itself: text.txt " in found.text
    assert load(scene / "out" / "recipe.yaml").calibration.self_share == 0.25


def test_the_command(scene, run):
    short = ("--text", "text.txt", "--self-share", 0, "--seq-len", 32)
    code, out, _ = run("search", "parent", "--target", "params=0.9x", *short, "--dry-run", "--json")
    space = json.loads(out)
    assert code == 0 and space["scored"] < space["options"] and space["operations"]["prune_width"]
    few = (*short, "--tokens", 128, "--allow", "prune_width", "-o", "out")
    code, out, _ = run("search", "parent", "--target", "params=0.9x", *few)
    assert code == 0 and "params=0.9x: 0.8" in out and "llmsurgeon run out/recipe.yaml" in out
    code, _, err = run("search", "parent", "--target", "params=0.01x", *few, "--overwrite")
    assert code == 2 and "out of reach" in err and (scene / "out" / "recipe.yaml").exists()


def test_an_encoder_is_chosen_by_a_distance_and_says_so(scene, run):
    """Nothing is called KL; distance and pooled cosine of the model that was made are of held-out text."""
    save_encoder(scene / "encoder", "bert")
    sizes = ("--text", "text.txt", "--tokens", 128, "--refit-tokens", 256, "--seq-len", 32, "--allow", "prune_width")
    code, out, err = run("search", "encoder", "--target", "params=0.9x", *sizes, "-o", "out")
    assert code == 0, err
    assert "distance alone" in out and "on text that fitted and chose nothing, pooled states at a cosine of" in out
    assert "KL" not in out + err
    report = json.loads((scene / "out" / "report.json").read_text())
    [made] = [point for point in report["points"] if point["kind"] == "made"]
    assert report["distance"] == "cosine" and made["held_out"] and -1 <= made["pooled"] <= 1
    assert made["low"] <= made["kl"] <= made["high"] and made["perplexity"] is None
    page = (scene / "out" / "report.html").read_text()
    assert "KL" not in page and "Cosine of pooled states" in page and "between the last hidden states" in page
    trained = ("--heal", 5, "--minutes", 1, "-o", "healed")
    assert run("search", "encoder", "--target", "params=0.9x", *sizes, *trained)[0] == 0
    step = load(scene / "healed" / "recipe.yaml").steps[-1]
    assert (step.kl, step.pooled, step.targets, step.minutes) == (0.0, 1.0, "memory", 5)
    # What the recipe makes has the very figures.
    outcome = run_recipe(load(scene / "out" / "recipe.yaml"), None, "made")
    assert 1 - outcome.evaluation.hidden_cosine == pytest.approx(made["kl"], abs=1e-6)
    assert outcome.evaluation.pooled_cosine == pytest.approx(made["pooled"], abs=1e-6)
