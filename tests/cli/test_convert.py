"""The commands run, fuse, prune, inspect, verify and analyze: JSON, messages, exit codes, nothing half-done."""

from __future__ import annotations

import json
from importlib import import_module

import pytest
import torch
from conftest import SMALL, tiny_model

from llmsurgeon.checkpoint.manifest import verify_files
from llmsurgeon.errors import SurgeryError


def test_fuse(run, folder):
    code, out, _ = run(
        *("fuse", "parent", "-o", "out", "--drop-attention", "2-4", "--runs", "1-2,3-4"),
        *("--text", "text.txt", *SMALL, "--json"),
    )
    report = json.loads(out)
    assert code == 0 and report["out"] == "out" and report["format"] == "surgeon"
    assert report["blocks"] == [[0], [1, 2], [3, 4], [5]]
    assert report["evaluation"]["kl"] > 0 and report["gate_missed"] == []
    assert [step["op"] for step in report["steps"]] == ["prune_attention", "fuse_ffn", "refit"]
    assert run("verify", "out")[0] == 0


def test_calibration_sizes_are_flags_too(run, folder):
    code, _, err = run(
        "prune", "parent", "-o", "out", "--attention", "2", "--text", "text.txt", "--tokens", 64, "--seq-len", 8
    )
    assert code == 0 and "64 tokens of text.txt" in err
    assert "tokens: 64, sequence_length: 8," in (folder / "out/recipe.yaml").read_text()
    code, _, err = run("prune", "parent", "-o", "other", "--attention", "2", "--text", "text.txt", "--tokens", 0)
    assert code == 2 and "--tokens" in err and not (folder / "other").exists()


def test_the_plan_is_shown_before_the_work(run, folder, monkeypatch):
    def fail(*arguments):
        raise SurgeryError("healing began")

    monkeypatch.setattr(import_module("llmsurgeon.run"), "heal_and_judge", fail)
    code, out, err = run("prune", "parent", "-o", "out", "--attention", "2", "--text", "text.txt", *SMALL)
    assert code == 2 and "healing began" in err
    assert "Plan for parent" in out and "prune_attention: layers=[2]" in out
    assert run("prune", "parent", "-o", "out", "--attention", "2", "--text", "text.txt", *SMALL, "--json")[1] == ""


def test_quiet_leaves_the_plan_out_and_commands_can_be_pasted(run, folder):
    code, out, _ = run("prune", "parent", "-o", "my out", "--attention", "2", "--no-refit", "--quiet")
    assert code == 0 and "Plan" not in out
    assert "llmsurgeon eval 'my out' --against parent does" in out and "wrote my out" in out


def test_fuse_chooses(run, folder):
    code, out, _ = run("fuse", "parent", "-o", "out", "--drop-count", 2, "--text", "text.txt", *SMALL, "--json")
    report = json.loads(out)
    assert code == 0 and report["after"]["attentions"] == 4 and report["after"]["blocks"] < 6


def test_prune(run, folder):
    code, out, _ = run(
        *("prune", "parent", "-o", "out", "--attention", "1", "--ffn", "2", "--blocks", "0,4", "--no-refit"),
        *("--set", "prune_attention.layers=[3]", "--json"),
    )
    report = json.loads(out)
    assert code == 0, "flags and --set"
    assert report["steps"][0]["layers"] == [3]
    assert report["blocks"] == [[1], [2], [3], [5]]
    assert report["evaluation"] is None


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        (("--kv-heads", "1"), {"num_key_value_heads": 1}),
        (("--width", "48", "--text", "text.txt", *SMALL), {"intermediate_size": 48}),
        (("--block-count", "2", "--text", "text.txt", *SMALL), {"num_hidden_layers": 4}),
    ],
)
def test_prune_stays_native(run, folder, flags, kept):
    assert run("prune", "parent", "-o", "out", *flags, "--no-refit")[0] == 0
    config = json.loads((folder / "out" / "config.json").read_text())
    assert config["model_type"] == "llama" and kept.items() <= config.items()


def test_the_plan_of_a_width_needs_no_text(run, folder):
    flags = ("prune", "parent", "--width", "48", "--no-refit", "--json")
    code, out, _ = run(*flags, "--dry-run")
    assert code == 0 and not (folder / "out").exists()
    foreseen = json.loads(out)
    code, out, _ = run(*flags, "--text", "text.txt", *SMALL, "-o", "out")
    made = json.loads(out)
    assert code == 0 and foreseen["after"]["parameters"] < foreseen["before"]["parameters"]
    same = foreseen.keys() - {"model", "calibration", "stream_bytes", "estimate"}
    assert {key: foreseen[key] for key in same} == {key: made[key] for key in same}
    assert foreseen["calibration"] == {"what the model writes (all)": 1.0}
    assert made["calibration"] == {"text.txt": 0.75, "what the model writes (all)": 0.25}
    # Least squares, the choice where there is text, walks it.
    assert foreseen["stream_bytes"] == 0 < made["stream_bytes"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("fuse", "parent", "--norm", "lst"), "options: fuse_ffn.norm: expected 'fold' or 'last', got 'lst'"),
        (("fuse", "parent", "--drop-count", "0"), "options: prune_attention.count: expected"),
        (("prune", "parent", "--kv-heads", "0"), "options: prune_kv_heads.kv_heads: expected"),
        (("prune", "parent", "--ffn", "1,x", "--width", "0"), "\n  - prune_width.width: expected"),
    ],
)
def test_flags_that_make_no_recipe(run, folder, flags, message):
    code, _, err = run(*flags, "-o", "out")
    assert code == 2 and message in err and "flags:" not in err
    assert not (folder / "out").exists() and not (folder / "out.partial").exists()


def test_run_a_recipe_file(run, folder):
    (folder / "mine.yaml").write_text(
        "version: 1\nmodel: parent\nsteps:\n  - {op: prune_blocks, layers: 4}\n  - {op: refit}\n"
    )
    code, out, _ = run("run", "mine.yaml", "--text", "text.txt", *SMALL)
    assert code == 0 and "wrote parent-mine" in out
    assert "perplexity" in out and "loads wherever the original does" in " ".join(out.split())
    code, out, _ = run("run", "mine.yaml", "parent-mine", "--dry-run", "--json")
    assert json.loads(out)["before"]["blocks"] == 5
    assert run("prune", "-r", "mine.yaml", "--text", "text.txt", *SMALL, "-o", "again")[0] == 0
    code, _, err = run("fuse", "-r", "mine.yaml", "-o", "other")
    assert code == 2 and "this recipe has no step for `fuse`: its steps are prune_blocks, refit" in err
    code, _, err = run("prune", "-r", "mine.yaml", "--width", "16", "--no-refit", "-o", "other")
    assert code == 2 and "--width, --refit beside --recipe" in err and not (folder / "other").exists()


def test_sequences_longer_than_the_models_positions(run, folder):
    settings = ("--text", "text.txt", "--set", "calibration.tokens=4096", "--set", "calibration.sequence_length=2048")
    code, _, err = run("prune", "parent", "--blocks", "2", *settings, "-o", "out")
    assert code == 2 and "is 2048, and the model has 128 positions" in err
    code, _, err = run("analyze", "parent", "--text", "text.txt", "--tokens", "4096", "--seq-len", "2048", "-o", "out")
    assert code == 2 and "is 2048, and the model has 128 positions" in err
    assert not (folder / "out").exists() and not (folder / "out.partial").exists()


def test_a_missed_gate_is_exit_code_3(run, folder):
    (folder / "mine.yaml").write_text(
        "version: 1\nsteps:\n  - {op: prune_blocks, layers: 1-4}\ngate: {max_perplexity_ratio: 0.01}\n"
    )
    command = ("run", "mine.yaml", "parent", "--text", "text.txt", *SMALL)
    code, out, err = run(*command, "-o", "out")
    assert code == 3 and "out is written, but it misses the recipe's gate: perplexity ratio" in err
    assert "wrote out" in out
    code, out, _ = run(*command, "-o", "again", "--json")
    assert code == 3 and "perplexity ratio" in json.loads(out)["gate_missed"][0]
    assert (folder / "out" / "config.json").exists()


def test_dry_run_writes_nothing(run, folder):
    before = sorted(folder.iterdir())
    code, out, _ = run("fuse", "parent", "--drop-attention", "2,3", "--runs", "1-3", "--dry-run")
    assert code == 0 and "format: surgeon (block 1 (FFN 288, 2 KV heads) differs" in out
    code, out, _ = run("fuse", "parent", "--drop-attention", "2,3", "--runs", "1-3", "--dry-run", "--json")
    assert json.loads(out)["after"]["blocks"] == 4
    assert sorted(folder.iterdir()) == before


def test_inspect(run, folder):
    code, out, _ = run("inspect", "parent", "--json")
    report = json.loads(out)
    assert code == 0 and len(report["layers"]) == 6
    assert report["parameters"] == sum(p.numel() for p in tiny_model("llama").parameters())
    assert run("fuse", "parent", "-o", "out", "--drop-attention", "2,3", "--runs", "2-3", "--no-refit")[0] == 0
    layers = json.loads(run("inspect", "out", "--json")[1])["layers"]
    assert [len(layer["attention"]) for layer in layers] == [1, 1, 0, 1, 1]
    assert [layer["ffn"][0]["width"] for layer in layers] == [96, 96, 192, 96, 96]
    _, out, _ = run("inspect", "out")
    assert "dense 192" in out and "4 heads, 2 KV, width 8" in out


def test_verify(run, folder):
    assert run("prune", "parent", "-o", "out", "--blocks", "2", "--no-refit")[0] == 0
    assert json.loads(run("verify", "out", "--json")[1]) == {"folder": "out", "ok": True, "problems": [], "remarks": []}
    config = folder / "out" / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps"', '"rms_norm_eps" '))
    code, _, err = run("verify", "out")
    assert code == 2 and "config.json" in err
    code, _, err = run("verify", "nowhere")
    assert code == 2 and "no such folder" in err
    code, _, err = run("verify", "out/config.json")
    assert code == 2 and "out/config.json: is a file; verify takes the folder" in err


def test_verify_finds_nan(run, folder):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[5].self_attn.q_proj.weight[0, 0] = float("nan")
    model.save_pretrained(folder / "bad")
    code, _, err = run("verify", "bad")
    assert code == 2 and "layers.5.self_attn.q_proj.weight" in err and "NaN" in err


def test_analyze_and_run_what_it_suggests(run, folder):
    arguments = ("--text", "text.txt", "--tokens", "512", "--seq-len", "16", "--drop", "2", "--max-run", "3")
    code, out, _ = run("analyze", "parent", "-o", "report", *arguments, "--json")
    report = json.loads(out)
    assert code == 0 and report["layers"] == 6 and len(report["suggestion"]["drop_attention"]) == 2
    files = ("report.json", "scores.safetensors", "suggested.yaml", "report.html")
    assert all((folder / "report" / name).stat().st_size for name in files)
    assert json.loads((folder / "report" / "report.json").read_text()) == report
    assert run("run", "report/suggested.yaml", "-o", "out", *SMALL)[0] == 0
    spec = json.loads(run("inspect", "out", "--json")[1])
    assert spec["blocks"] == report["suggestion"]["blocks_after"] and spec["attentions"] == 4


def test_an_analysis_replaces_nothing_that_it_did_not_write(run, folder):
    arguments = ("analyze", "parent", "-o", "report", "--text", "text.txt", "--tokens", "256", "--seq-len", "16")
    (folder / "report").mkdir()
    (folder / "report" / "report.html").write_text("mine")
    for options, message in (((), "exists already"), (("--overwrite",), "was not written by llmsurgeon")):
        code, _, err = run(*arguments, *options)
        assert code == 2 and message in err
    assert [path.name for path in (folder / "report").iterdir()] == ["report.html"]
    assert (folder / "report" / "report.html").read_text() == "mine"
    (folder / "report" / "report.html").unlink()
    assert run(*arguments)[0] == 0 and verify_files(folder / "report") == []
    before = (folder / "report" / "suggested.yaml").read_text()
    assert run(*arguments)[0] == 2
    assert run(*arguments, "--overwrite", "--drop", "1")[0] == 0
    assert (folder / "report" / "suggested.yaml").read_text() != before
    (folder / "report" / "notes.txt").write_text("mine")
    code, _, err = run(*arguments, "--overwrite")
    assert code == 2 and "holds notes.txt, which llmsurgeon did not write" in err
    assert not list(folder.glob("*.partial"))


def test_a_folder_that_cannot_be_written_is_heard_of_before_measuring(run, folder, monkeypatch):
    monkeypatch.setattr(import_module("llmsurgeon.analyze"), "measure", lambda *arguments: pytest.fail("it measured"))
    (folder / "file").write_text("mine")
    code, _, err = run("analyze", "parent", "-o", "file/report", "--text", "text.txt", "--tokens", "256")
    assert code == 2 and "file is a file" in err


def test_what_the_run_reads_is_not_overwritten(run, folder):
    arguments = ("prune", "parent", "--blocks", "2", "--no-refit", "-o", "out", "--overwrite")
    assert run(*arguments)[0] == 0
    (folder / "text.txt").rename(folder / "out" / "text.txt")
    (folder / "out" / "mine.yaml").write_text(
        "version: 1\ncalibration: {text: out/text.txt, tokens: 256, sequence_length: 16}\n"
        "steps: [{op: prune_blocks, layers: [2]}]\n"
    )
    (folder / "out" / "mine.yaml").rename(folder / "mine.yaml")
    code, _, err = run("run", "mine.yaml", "parent", "-o", "out", "--overwrite")
    assert code == 2 and "holds out/text.txt, which this run reads" in err
    code, _, err = run(*arguments, "--text", "out/text.txt")
    assert code == 2 and "holds out/text.txt, which this run reads" in err
    (folder / "out" / "text.txt").rename(folder / "text.txt")
    code, _, err = run("run", "out/recipe.yaml", "parent", "-o", "out", "--overwrite")
    assert code == 2 and "recipe.yaml, which this run reads" in err and (folder / "out" / "recipe.yaml").exists()


def test_analyze_tables(run, folder):
    code, out, _ = run("analyze", "parent", "--text", "text.txt", "--tokens", "256", "--seq-len", "16")
    assert code == 0 and "next: llmsurgeon run parent-analysis/suggested.yaml" in out
    assert "its refit takes 65,536 tokens" in out
    code, _, err = run(
        "analyze", "parent", "--text", "text.txt", "--tokens", "256", "--seq-len", "16", "-o", "other", "--drop", "9"
    )
    assert code == 2 and "expected 1 to 5" in err and not list(folder.glob("other*"))


def test_analyze_on_a_narrow_terminal_and_in_a_folder_with_a_space(run, folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    small = ("--text", "text.txt", "--tokens", "256", "--seq-len", "16", "--drop", "2")
    code, out, err = run("analyze", "parent", "-o", "my report", *small)
    assert code == 0, err
    assert "\N{HORIZONTAL ELLIPSIS}" not in out and "suggestion" in out
    assert "next: llmsurgeon run 'my report/suggested.yaml' -o OUT" in out


BAD = {
    "layer out of range": (("prune", "parent", "--attention", "6"), "layer 6 is not in the model: it has layers 0 to"),
    "overlapping runs": (("fuse", "parent", "--drop-attention", "2-4", "--runs", "1-3,3-4"), "overlap"),
    "run across attention": (
        ("fuse", "parent", "--drop-attention", "2", "--runs", "1-3"),
        "run [1-3] goes across the attention of layer 3",
    ),
    "format": (
        ("prune", "parent", "--attention", "0", "--set", "format=nemotron-nas"),
        "format nemotron-nas cannot hold this model: block 0 has no attention",
    ),
    "nothing to fuse": (("fuse", "parent", "--runs", "1-2"), "goes across the attention of layer 2"),
    "nothing to prune": (("prune", "parent"), "nothing to prune"),
    "two choices": (("fuse", "parent", "--drop-attention", "2", "--drop-count", "2"), "not both"),
    "no model": (("prune", "--attention", "2"), "no model"),
    "no such model": (("prune", "./nowhere", "--attention", "2"), "nowhere"),
    "bad layers": (("prune", "parent", "--attention", "two"), "two"),
    "all attention": (("prune", "parent", "--attention", "0-5"), "no attention would be left"),
    "kv heads": (("prune", "parent", "--kv-heads", "3"), "which 3 does not divide"),
    "width": (("prune", "parent", "--width", "97", "--set", "prune_width.score=magnitude"), "97 asked for"),
    "size": (("prune", "parent", "--blocks", "2", "--max-shard-size", "huge"), "is not a file size"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(run, folder, what):
    arguments, message = BAD[what]
    before = sorted(folder.iterdir())
    code, out, err = run(*arguments, "--no-refit", "-o", "out")
    assert code == 2 and out == ""
    assert err.splitlines()[-1].strip() and message in err and "Traceback" not in err
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the text is empty"),
        (" \n\n", "the text is empty"),
        ("short", "5 tokens are fewer than one window of 16"),
        (None, "no such text file"),
        ("just one window of text", "cannot be split into training and held-out"),
    ],
)
def test_bad_text(run, folder, text, message):
    if text is None:
        (folder / "text.txt").unlink()
    else:
        (folder / "text.txt").write_text(text)
    before = sorted(folder.iterdir())
    code, _, err = run(
        "prune", "parent", "--blocks", "2", "-o", "out", "--text", "text.txt", "--self-share", "0", *SMALL
    )
    assert code == 2 and message in err
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    "verb", ["run shortgpt nowhere", "eval nowhere", "analyze nowhere", "heal nowhere --parent nowhere"]
)
def test_a_missing_text_is_said_before_anything_is_opened(run, folder, verb):
    code, _, err = run(*verb.split(), "--text", "none.txt")
    assert code == 2 and err == "error: none.txt: no such text file\n"


def test_cuts_after_healing(run, folder):
    (folder / "mine.yaml").write_text("version: 1\nsteps:\n  - {op: refit}\n  - {op: prune_blocks, layers: 2}\n")
    before = sorted(folder.iterdir())
    code, _, err = run("run", "mine.yaml", "parent", "-o", "out", "--text", "text.txt", *SMALL)
    assert code == 2 and "prune_blocks comes after refit: cuts come first, healing last" in err
    assert sorted(folder.iterdir()) == before


def test_out_exists(run, folder):
    arguments = ("prune", "parent", "--blocks", "2", "--no-refit", "-o", "out")
    assert run(*arguments)[0] == 0
    before = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    code, _, err = run(*arguments[:3], "1,2", *arguments[4:])
    assert code == 2 and "exists already" in err and "--overwrite" in err
    assert {path.name: path.read_bytes() for path in (folder / "out").iterdir()} == before
    assert run(*arguments[:3], "1,2", *arguments[4:], "--overwrite")[0] == 0
    assert json.loads((folder / "out" / "config.json").read_text())["num_hidden_layers"] == 4
    code, _, err = run("prune", "parent", "--blocks", "2", "--no-refit", "-o", "parent", "--overwrite")
    assert code == 2 and "is where the model is read from" in err
    (folder / "notes").mkdir()
    (folder / "notes" / "diary.txt").write_text("dear diary")
    code, _, err = run("prune", "parent", "--blocks", "2", "--no-refit", "-o", "notes", "--overwrite")
    assert code == 2 and (folder / "notes" / "diary.txt").read_text() == "dear diary"
    assert sorted(path.name for path in folder.iterdir()) == ["notes", "out", "parent", "text.txt"]


def test_calibration_sampled_from_the_model_itself(run, folder):
    code, out, err = run("prune", "parent", "--blocks", "2", "-o", "out", *SMALL, "--json")
    assert code == 0 and json.loads(out)["evaluation"]["perplexity"] > 1
    assert "sampled from" in err
