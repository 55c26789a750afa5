"""`llmsurgeon matmulfree`: what it writes, that the other commands take it, and how bad input ends."""

from __future__ import annotations

import json
import random

import pytest
import torch
from conftest import SMALL, save_encoder, save_tiny
from generation import generate
from operations.helpers import logits, some_tokens
from transformers import AutoModelForCausalLM

from llmsurgeon.formats.loading import load_model
from llmsurgeon.modeling.surgeon_mlgru import MLGRU
from llmsurgeon.recipe.recipe import builtin_recipes, load


@pytest.fixture
def hybrid(run, folder):
    """A checkpoint with MLGRUs in layers 1 and 3, and the report of making it."""
    how = ("--layers", "1,3", "--text", "text.txt", *SMALL, "--json")
    code, out, err = run("matmulfree", "parent", "-o", "out", *how)
    assert code == 0, err
    return json.loads(out)


def test_flags_write_a_checkpoint_that_every_command_takes(run, folder, hybrid):
    assert hybrid["format"] == "surgeon" and [s["op"] for s in hybrid["steps"]] == ["matmulfree", "refit"]
    assert hybrid["before"]["attentions"] == 6 and hybrid["after"]["attentions"] == 4
    assert hybrid["after"]["kv_bytes_per_token"] * 6 == hybrid["before"]["kv_bytes_per_token"] * 4
    assert hybrid["evaluation"]["kl"] > 0
    model = load_model("out")
    assert sum(isinstance(m, MLGRU) for m in model.modules()) == 2
    assert torch.isfinite(logits(model, some_tokens())).all()
    card = (folder / "out" / "README.md").read_text()
    assert "2 attentions are MLGRUs, 4 are left" in card and "64 numbers of state" in card
    assert run("verify", "out")[0] == 0
    code, out, _ = run("inspect", "out")
    assert code == 0 and out.count("MLGRU 32") == 2
    code, out, err = run("eval", "out", "--against", "parent", "--text", "text.txt", "--seq-len", 32, "--json")
    assert code == 0 and json.loads(out)["kl"] > 0, err
    code, _, err = run("analyze", "out", "--text", "text.txt", "--tokens", 256, "--seq-len", 16, "--drop", 2)
    assert code == 0, err
    code, _, err = run("run", "out-analysis/suggested.yaml", "-o", "again", *SMALL)
    assert code == 0, err
    sizes = ("--prompt", 16, "--new-tokens", 4, "--batch", 1, "--rounds", 1)
    code, out, err = run("bench", "out", "--against", "parent", *sizes, "--json")
    assert code == 0, err


def test_it_is_healed_and_cut_further(run, folder, hybrid):
    draw = random.Random(0)
    (folder / "long.txt").write_text("".join(draw.choices("abcdefgh ,.\n", k=8000)))
    short = ("--set", "distill.sequence_length=16", "--set", "distill.batch=2")
    code, out, err = run(
        *("heal", "out", "--parent", "parent", "-o", "healed", "--text", "long.txt", "--minutes", 0.05, *SMALL, *short)
    )
    assert code == 0, err
    assert run("verify", "healed")[0] == 0
    code, _, err = run("matmulfree", "out", "-o", "all", "--no-refit")
    assert code == 0, err
    code, out, _ = run("inspect", "all", "--json")
    assert json.loads(out)["kv_bytes_per_token"] == 0 and json.loads(out)["attentions"] == 0
    code, _, err = run("matmulfree", "all", "-o", "ternary", "--linears", "ternary")
    assert code == 0, err
    assert run("verify", "ternary")[0] == 0 and "bitlinear" in run("inspect", "ternary")[1]


def test_a_dry_run_shows_the_cache_falling(run, folder):
    code, out, err = run("matmulfree", "parent/config.json", "--keep-attention", "0,5", "--dry-run", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["after"]["kv_bytes_per_token"] * 3 == report["before"]["kv_bytes_per_token"]
    assert report["steps"][0]["layers"] == [1, 2, 3, 4]
    code, out, _ = run("matmulfree", "parent", "--dry-run")
    assert code == 0 and "-100.0 %" in out and not (folder / "parent-matmulfree").exists()


def test_the_analysis_chooses(run, folder):
    code, out, err = run("matmulfree", "parent", "-o", "out", "--count", 2, "--text", "text.txt", *SMALL, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert len(report["steps"][0]["layers"]) == 2 and report["after"]["attentions"] == 4


def test_a_missed_gate_says_so(run, folder):
    recipe = "version: 1\nsteps:\n  - {op: matmulfree, linears: ternary}\ngate: {max_kl: 0.0001}\n"
    (folder / "gated.yaml").write_text(recipe)
    code, _, err = run("matmulfree", "parent", "-r", "gated.yaml", "-o", "out", "--text", "text.txt", *SMALL)
    assert code == 3 and "it misses the recipe's gate: KL" in err
    assert "The quality gate of the recipe failed" in (folder / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--layers", "1-9"), "layer 6 is not in the model: it has layers 0 to 5"),
        (("--keep-attention", "7"), "keep_attention: layer 7 is not in the model"),
        (("--keep-attention", "0-5"), "nothing to do"),
        (("--count", 7), "count 7 asked for, only 6 layers qualify"),
        (("--layers", "1", "--count", 2), "takes one of layers, keep_attention and count"),
        (("--linears", "binary"), "expected 'float' or 'ternary'"),
        (("--linears", "ternary", "--set", "matmulfree.context=1"), "greater than or equal to 2"),
        (("--recipe", "shortgpt"), "this recipe has no step for `matmulfree`"),
    ],
)
def test_bad_input_is_exit_code_2_and_nothing_written(run, folder, flags, message):
    settings = ("--text", "text.txt", "--set", "calibration.sequence_length=128")
    code, _, err = run("matmulfree", "parent", "-o", "out", *flags, *settings)
    assert code == 2 and message in err
    assert not (folder / "out").exists() and not list(folder.glob("out*"))


def test_families_that_it_does_not_take(run, folder):
    save_encoder(folder / "encoder", "bert")
    code, _, err = run("matmulfree", "encoder", "-o", "out", "--text", "text.txt")
    assert code == 2 and "bert: matmulfree: it is an encoder and reads in both directions" in err
    save_tiny(folder / "gpt2", "gpt2", tokenizer=True)
    code, _, err = run("matmulfree", "gpt2", "-o", "out", "--text", "text.txt")
    assert code == 2 and "gpt2: matmulfree: an MLGRU takes the place of an attention that reads through an RMSN" in err
    assert not (folder / "out").exists()


def test_exports_name_the_first_block_that_does_not_fit(run, folder, hybrid):
    for form, target in (("nemotron-nas", "made"), ("native", "made"), ("gguf", "made.gguf")):
        code, _, err = run("export", "out", "--to", form, "-o", target)
        assert code == 2 and "block 1 has an MLGRU in the place of its attention" in err, err
        assert not (folder / target).exists()


@pytest.mark.parametrize("name", ["matmulfree", "matmulfree-hybrid"])
def test_the_recipes_are_there(name):
    assert name in builtin_recipes() and load(name).steps[0].op == "matmulfree"


def test_two_checkpoints_generate_in_one_process(run, folder):
    """Each brings classes of its own, and transformers makes all caches of those that came last."""
    for name in ("first", "second"):
        assert run("matmulfree", "parent", "-o", name, "--layers", "1", "--no-refit")[0] == 0
    models = [AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True) for name in ("first", "second")]
    assert type(models[0]) is not type(models[1])
    made = [generate(model.eval(), some_tokens()[:, :8], max_new_tokens=4) for model in models]
    assert torch.equal(made[0], made[1])
