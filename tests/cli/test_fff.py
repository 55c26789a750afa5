"""`llmsurgeon fff`: what it writes, that it loads, and how bad input ends."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import SMALL, encoder_tokenizer, save_encoder, save_tiny
from operations.helpers import logits, some_tokens
from safetensors import safe_open

from llmsurgeon.checkpoint.manifest import verify_files
from llmsurgeon.formats.loading import load_model
from llmsurgeon.modeling import surgeon_fff
from llmsurgeon.recipe.recipe import builtin_recipes, load


def test_flags_write_a_checkpoint_that_loads_and_verifies(run, folder, monkeypatch):
    flags = ("--depth", 2, "--leaf-width", 24, "--shared", 16, "--layers", "1,3-4", "--set", "fff.min_tokens=8")
    code, out, err = run("fff", "parent", "-o", "out", *flags, "--text", "text.txt", *SMALL, "--dry-run", "--json")
    assert code == 0, err
    # What a layer's trees cost and which tokens reach them is measured on text.
    foreseen = {key: value for key, value in json.loads(out).items() if key not in ("model", "notes", "estimate")}
    assert not (folder / "out").exists()
    code, out, err = run("fff", "parent", "-o", "out", *flags, "--text", "text.txt", *SMALL, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert foreseen == {key: report[key] for key in foreseen}
    assert report["format"] == "surgeon" and [s["op"] for s in report["steps"]] == ["fff", "refit"]
    assert report["after"]["flops_per_token"] < report["before"]["flops_per_token"]
    assert verify_files(folder / "out") == []
    names = {path.name for path in (folder / "out").iterdir()}
    assert {"surgeon_fff.py", "surgeon_fff_numba.py", "surgeon_fff_triton.py"} <= names
    assert "16 shared" in (folder / "out" / "README.md").read_text()
    code, out, _ = run("inspect", "out", "--json")
    shape = {"form": "leaf", "depth": 2, "leaf_width": 24, "shared": 16, "active": 40}
    assert shape.items() <= json.loads(out)["layers"][3]["ffn"][0].items()
    monkeypatch.setenv("COLUMNS", "200")  # no cell is broken into lines
    said = " ".join(run("inspect", "out")[1].split())
    assert "fff 112" in said and "dense 96" in said
    model = load_model("out")
    trees = [m for m in model.modules() if isinstance(m, surgeon_fff.FastFeedForward)]
    assert len(trees) == 3 and torch.isfinite(logits(model, some_tokens())).all()
    with safe_open(folder / "out" / "model.safetensors", framework="pt") as opened:
        assert opened.get_tensor("model.layers.3.mlp.leaf_down").shape == (4, 24, 32)


def test_a_budget_and_its_resolved_recipe_repeats_it(run, folder):
    code, _, err = run(
        *("fff", "parent", "-o", "out", "--keep", 0.5, "--depth", 2, "--set", "fff.min_tokens=8"),
        *("--text", "text.txt", "--self-share", 0, *SMALL),
    )
    assert code == 0, err
    step = load(folder / "out" / "recipe.yaml").steps[0]
    assert step.keep is None and step.shapes
    assert run("fff", "parent", "-o", "again", "-r", "out/recipe.yaml")[0] == 0
    a, b = (folder / name / "model.safetensors" for name in ("out", "again"))
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("form", ["leaf", "node"])
def test_a_dry_run_of_a_budget_counts_the_share_and_says_that_shapes_come_later(run, folder, form):
    flags = ("--form", form, "--keep", 0.7, "--dry-run")
    code, out, err = run("fff", "parent", "-o", "out", *flags)
    assert code == 0, err
    said = " ".join(out.split())
    assert "Shapes within the share of 0.7 are chosen by measured error in the run itself" in said
    code, out, _ = run("fff", "parent", "-o", "out", *flags, "--json")
    plan = json.loads(out)
    assert plan["steps"][0]["keep"] == 0.7 and plan["steps"][0]["shapes"] is None
    assert 0.4 < plan["after"]["flops_per_token"] / plan["before"]["flops_per_token"] < 1
    assert not list(folder.glob("out*"))


def test_a_dry_run_of_one_shape_names_it(run, folder):
    code, out, err = run("fff", "parent", "--depth", 2, "--leaf-width", 24, "--layers", "1", "--dry-run")
    assert code == 0, err
    said = " ".join(out.split())
    assert "layer 1: depth 2, 4 leaves of 24 neurons, 0 shared, 25.7 % of the FFN's multiplications" in said
    _, out, _ = run("fff", "parent", "--depth", 2, "--leaf-width", 24, "--layers", "1,3-5", "--dry-run")
    assert "layers 1, 3-5: depth 2, 4 leaves of 24 neurons" in " ".join(out.split()), "alike layers once"


def test_an_encoder(run, folder):
    save_encoder(folder / "encoder", "bert")
    code, out, err = run(
        *("fff", "encoder", "-o", "out", "--form", "node", "--depth", 1, "--text", "text.txt", *SMALL, "--json")
    )
    assert code == 0, err
    assert json.loads(out)["evaluation"]["pooled_cosine"] > 0.5


def test_an_encoder_on_sentences(run, folder):
    save_encoder(folder / "encoder", "bert")
    tokenizer = encoder_tokenizer()
    tokenizer.pad_token = "\n"
    tokenizer.save_pretrained(folder / "encoder")
    prose = (f"This is sentence number {i} of a text about nothing at all{', really' * (i % 5)}." for i in range(200))
    (folder / "prose.txt").write_text(" ".join(prose))
    flags = ("--depth", 1, "--leaf-width", 48, "--text", "prose.txt", "--set", "calibration.sentences=true")
    code, out, err = run("fff", "encoder", "-o", "out", *flags, *SMALL, "--json")
    assert code == 0, err
    assert json.loads(out)["evaluation"]["pooled_cosine"] > 0.5
    code, _, err = run("fff", "parent", "-o", "no", *flags)
    assert code == 2 and "calibration.sentences is for encoders" in err and not (folder / "no").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "no shape: give --recipe, or --keep, or --depth"),
        (("--depth", 7, "--leaf-width", 4), "depth 7 makes 128 leaves of 96 neurons"),
        (("--form", "node", "--depth", 7), "the deepest tree is 6"),
        (("--depth", 6, "--leaf-width", 4), "are needed (min_tokens); lower depth or raise calibration.tokens"),
        (("--depth", 2), "the leaf form needs leaf_width"),
        (("--recipe", "shortgpt"), "this recipe has no step for `fff`"),
    ],
)
def test_bad_input_is_exit_code_2_and_nothing_written(run, folder, flags, message):
    if "min_tokens" not in message:
        code, _, err = run("fff", "parent", "-o", "out", *flags, "--dry-run")
        assert code == 2 and message in err
    code, _, err = run(
        *("fff", "parent", "-o", "out", *flags, "--text", "text.txt"),
        *("--self-share", 0, "--set", "calibration.sequence_length=128"),
    )
    assert code == 2 and message in err
    assert not (folder / "out").exists() and not list(folder.glob("out*"))


def test_mixture_of_experts_layers_are_refused(run, folder):
    save_tiny(folder / "mixture", "mixtral", tokenizer=True)
    code, _, err = run("fff", "mixture", "-o", "out", "--keep", 0.5, "--text", "text.txt")
    assert code == 2 and "mixtral: fff: its FFN is a mixture of experts" in err
    assert not (folder / "out").exists()


def test_a_forced_kernel_that_is_not_installed_ends_the_command(run, folder, monkeypatch):
    monkeypatch.setenv("LLMSURGEON_FFF_KERNEL", "numba")
    monkeypatch.setattr(surgeon_fff, "installed", lambda name: False)
    code, _, err = run("fff", "parent", "-o", "out", "--keep", 0.5, "--text", "text.txt", *SMALL)
    assert code == 2 and "LLMSURGEON_FFF_KERNEL=numba: numba is not installed" in err
    assert not (folder / "out").exists()


@pytest.mark.parametrize("name", ["ultrafastbert-1x11", "minilm-fff", "smollm2-fff"])
def test_the_recipes_are_there(name):
    assert name in builtin_recipes() and load(name).steps[0].op == "fff"
