"""`llmsurgeon ternary`: what it writes, that it loads, and how bad input ends."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import SMALL, save_encoder, save_tiny
from operations.helpers import logits, some_tokens
from transformers import AutoModelForCausalLM

from llmsurgeon.checkpoint.manifest import verify_files
from llmsurgeon.formats.loading import load_model
from llmsurgeon.model.ternary import grid_of, is_ternary
from llmsurgeon.recipe.recipe import load

TEXT = ("--text", "text.txt", *SMALL)


def ternary_names(path):
    model = AutoModelForCausalLM.from_pretrained(path)
    return {name for name, t in model.state_dict().items() if t.dim() == 2 and is_ternary(t)}


def test_flags_write_a_plain_checkpoint_that_everything_loads(run, folder):
    code, out, err = run(
        *("ternary", "parent", "-o", "out", "--linears", "ffn", "--layers", "1,3-4", "--granularity", "row"),
        *("--refit", *TEXT, "--json"),
    )
    assert code == 0, err
    report = json.loads(out)
    assert report["format"] == "native" and [s["op"] for s in report["steps"]] == ["ternary", "refit"]
    assert report["evaluation"]["kl"] > 0 and verify_files(folder / "out") == []
    assert json.loads((folder / "out/config.json").read_text())["model_type"] == "llama"
    assert ternary_names("out") == {
        f"model.layers.{i}.mlp.{n}_proj.weight" for i in (1, 3, 4) for n in ("gate", "up", "down")
    }
    assert grid_of(AutoModelForCausalLM.from_pretrained("out").model.layers[3].mlp.up_proj.weight).granularity == "row"
    stock, ours = AutoModelForCausalLM.from_pretrained("out"), load_model("out")
    assert torch.equal(logits(stock, some_tokens()), logits(ours, some_tokens()))
    story = json.loads((folder / "out/surgery.json").read_text())
    assert len(story["ternary"]) == 9 and {"error", "rounding", "zeros"} <= set(story["ternary"][0])
    card = (folder / "out/README.md").read_text()
    assert "Ternary: 9 linears of 3 blocks, a scale for each row" in card and "Ternarised 9 linears" in card


def test_inspect_names_the_ternary_linears(run, folder):
    code, _, err = run("ternary", "parent", "-o", "out", "--method", "round", "--linears", "ffn", "--layers", "1,3")
    assert code == 0, err
    layers = json.loads(run("inspect", "out", "--json")[1])["layers"]
    ffn = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert [layer["ternary"] for layer in layers] == [ffn if i in (1, 3) else [] for i in range(6)]
    assert run("inspect", "out")[1].count("down_proj") == 2
    assert "ternary" not in run("inspect", "parent")[1]
    assert "ternary" not in json.loads(run("inspect", "out/config.json", "--json")[1])["layers"][0]


def test_a_text_that_nothing_else_needs_measures(run, folder):
    code, out, err = run("ternary", "parent", "-o", "out", "--method", "round", *TEXT, "--json")
    assert code == 0, err
    assert json.loads(out)["evaluation"]["kl"] > 0
    assert "perplexity" in (folder / "out/README.md").read_text()


def test_norms_before_output_projections(run, folder):
    code, out, err = run("ternary", "parent", "-o", "out", "--sub-norm", "--layers", "1-2", *TEXT, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["format"] == "surgeon" and report["evaluation"]["kl"] > 0
    assert "An RMSNorm stands before 4 of them" in (folder / "out/README.md").read_text()
    stock, ours = AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True), load_model("out")
    assert torch.equal(logits(stock, some_tokens()), logits(ours, some_tokens()))
    layers = json.loads(run("inspect", "out", "--json")[1])["layers"]
    assert [layer["attention"][0]["sub_norm"] for layer in layers] == [i in (1, 2) for i in range(6)]
    assert run("inspect", "out")[1].count("normed") == 4 and run("verify", "out")[0] == 0
    assert run("ternary", "parent", "--sub-norm", "--dry-run")[0] == 0
    short = (
        "--minutes",
        9,
        "--set",
        "distill.steps=2",
        "--set",
        "distill.sequence_length=16",
        "--set",
        "distill.batch=2",
    )
    code, _, err = run("heal", "out", "--parent", "parent", "-o", "healed", *short, *TEXT)
    assert code == 0, err
    state = load_model("healed").state_dict()
    assert is_ternary(state["model.layers.1.mlp.down_proj.weight"]) and any("ffn_sub_norm" in name for name in state)


def test_rounding_needs_no_text_and_a_resolved_recipe_repeats_it(run, folder):
    code, _, err = run("ternary", "parent", "-o", "out", "--method", "round")
    assert code == 0, err
    assert len(ternary_names("out")) == 42
    code, _, err = run("ternary", "parent", "-o", "half", "--share", 0.5, "--method", "round", *TEXT)
    assert code == 0, err
    step = load(folder / "half/recipe.yaml").steps[0]
    assert step.share is None and sum(map(len, step.modules.values())) < 42
    assert run("run", "half/recipe.yaml", "parent", "-o", "again")[0] == 0
    a, b = (folder / name / "model.safetensors" for name in ("half", "again"))
    assert a.read_bytes() == b.read_bytes()


def test_a_dry_run_tells_the_plan(run, folder):
    code, out, _ = run("ternary", "parent", "--layers", 2, "--dry-run")
    assert code == 0 and "ternary: " in out and not (folder / "parent-ternary").exists()


def test_an_encoder(run, folder):
    save_encoder(folder / "encoder", "bert")
    code, out, err = run("ternary", "encoder", "-o", "out", "--linears", "ffn", *TEXT, "--json")
    assert code == 0, err
    assert json.loads(out)["evaluation"]["pooled_cosine"] > 0.2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--granularity", "group"), "granularity group goes with group_size"),
        (("--granularity", "group", "--group-size", 64), "numbers are not whole groups of 64; group_size may be 32"),
        (("--share", 0.5, "--max-bytes", 100), "share or max_bytes, not both"),
        (("--max-bytes", 100), "max_bytes 100 is out of reach"),
        (("--set", "ternary.head=true"), "head and embedding are one tied tensor"),
        (("--recipe", "shortgpt"), "this recipe has no step for `ternary`"),
    ],
)
@pytest.mark.parametrize("method", ["round", "compensated"])
def test_bad_input_is_exit_code_2_and_nothing_written(run, folder, flags, message, method):
    save_tiny(folder / "tied", "llama", tokenizer=True, tie_word_embeddings=True)
    settings = ("--text", "text.txt", "--set", "calibration.sequence_length=128")
    how = () if "--recipe" in flags else ("--method", method)
    code, _, err = run("ternary", "tied", "-o", "out", *how, *flags, *settings)
    assert code == 2 and message in err
    assert not list(folder.glob("out*"))


def test_what_is_ternary_or_quantised_is_refused(run, folder):
    assert run("ternary", "parent", "-o", "once", "--method", "round", "--layers", 2)[0] == 0
    for method in ("round", "compensated"):
        code, _, err = run("ternary", "once", "-o", "out", "--method", method, "--text", "text.txt")
        assert code == 2 and "model.layers.2.self_attn" in err and "is ternary already" in err
    config = json.loads((folder / "parent/config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "parent/config.json").write_text(json.dumps(config))
    for more in ((), ("--dry-run",)):
        code, _, err = run("ternary", "parent", "-o", "out", *more)
        assert code == 2 and "its weights are quantised already (quantization_config: gptq)" in err
    assert not list(folder.glob("out*"))


def test_cuts_come_before(run, folder):
    (folder / "r.yaml").write_text(
        "version: 1\nsteps:\n  - {op: ternary, method: round}\n  - {op: prune_ffn, layers: [1]}\n"
    )
    code, _, err = run("run", "r.yaml", "parent", "-o", "out")
    assert code == 2 and "step prune_ffn comes after ternary" in err


def test_two_steps_with_norms_are_refused_before_anything_is_measured(run, folder):
    (folder / "r.yaml").write_text(
        "version: 1\nsteps:\n  - {op: ternary, method: round, sub_norm: true, linears: ffn, layers: [1]}\n"
        "  - {op: ternary, method: round, sub_norm: true, linears: attention, layers: [2]}\n"
    )
    for more in ((), ("--dry-run",)):
        code, _, err = run("run", "r.yaml", "parent", "-o", "out", *TEXT, *more)
        assert code == 2 and "a step with sub_norm is the only ternary step of a recipe" in err, err
    assert not list(folder.glob("out*"))


def test_the_packed_form_is_verified_by_its_files(run, folder):
    assert run("ternary", "parent", "-o", "out", "--method", "round")[0] == 0
    assert run("export", "out", "--to", "bitnet", "-o", "packed")[0] == 0
    code, out, _ = run("verify", "packed")
    assert code == 0 and "files are in order; the packed form is for transformers to load" in out
    assert json.loads(run("verify", "packed", "--json")[1])["ok"]
    code, _, err = run("eval", "packed", "--text", "text.txt")
    assert code == 2 and "holds packed ternary linears (bitnet)" in err
    (folder / "packed/model.safetensors").write_bytes((folder / "packed/model.safetensors").read_bytes()[:-1])
    assert run("verify", "packed")[0] == 2
