"""`llmsurgeon export`: what it writes, what it prints, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import save_tiny

from llmsurgeon.formats.loading import load_model
from llmsurgeon.recipe.recipe import loads
from llmsurgeon.run import Options
from llmsurgeon.run import run as run_recipe


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with a parent and a student without an attention."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "parent", "llama", tokenizer=True, intermediate_size=256)
    recipe = loads("version: 1\nsteps:\n  - {op: prune_attention, layers: [2]}\nformat: surgeon\n")
    run_recipe(recipe, "parent", "student", Options())
    return tmp_path


@pytest.mark.parametrize("form", ["native", "nemotron-nas", "surgeon"])
def test_export_a_checkpoint(run, folder, form):
    code, out, err = run("export", "student", "--to", form, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["format"] == form and Path(report["out"]) == folder / f"student-{form}"
    assert report["before"]["attentions"] == 6
    assert report["after"]["attentions"] == (6 if form == "native" else 5)
    assert run("verify", f"student-{form}")[0] == 0
    code, out, err = run("inspect", f"student-{form}", "--json")
    assert code == 0 and len(json.loads(out)["layers"]) == 6
    assert type(load_model(f"student-{form}")).__name__.endswith("LlamaForCausalLM")


def test_what_it_prints(run, folder):
    code, out, _ = run("export", "student", "--to", "nemotron-nas", "-o", "nas")
    assert code == 0 and "nas (nemotron-nas)" in out and "vLLM" in out
    code, out, _ = run("inspect", "nas")
    assert code == 0 and "nas: nemotron-nas" in out


def test_the_files(run, folder):
    """Card, recipe and measurements of the student go along; so do tokenizer and code."""
    assert run("export", "student", "--to", "nemotron-nas", "-o", "nas", "--max-shard-size", "100KB")[0] == 0
    names = {path.name for path in (folder / "nas").iterdir()}
    assert {"config.json", "tokenizer.json", "recipe.yaml", "surgery.json", "checksums.b3"} <= names
    assert {"configuration_decilm.py", "modeling_decilm.py", "model.safetensors.index.json"} <= names
    assert (folder / "nas" / "recipe.yaml").read_text() == (folder / "student" / "recipe.yaml").read_text()
    card = (folder / "nas" / "README.md").read_text()
    assert "| attentions | 6 | 5 |" in card and "Exported to nemotron-nas from `student`" in card
    assert json.loads((folder / "nas" / "surgery.json").read_text())["format"] == "nemotron-nas"


def test_a_model_that_was_not_operated_on(run, folder):
    assert run("export", "parent", "--to", "surgeon", "-o", "plain")[0] == 0
    card = (folder / "plain" / "README.md").read_text()
    assert "# parent as surgeon" in card and "without a change to what it computes" in card
    assert "Recipe" not in card and not (folder / "plain" / "recipe.yaml").exists()
    (folder / "student" / "surgery.json").write_text("[")
    assert run("export", "student", "--to", "surgeon", "-o", "untold")[0] == 0
    assert not (folder / "untold" / "surgery.json").exists()


BAD = {
    "unknown form": (["student", "--to", "onnx"], "onnx"),
    "no form": (["student"], "--to"),
    "no model": (["nowhere", "--to", "native"], "nowhere: no such"),
    "type for a checkpoint": (
        ["student", "--to", "native", "--type", "Q8_0"],
        "--type, --float-type, --pre and --modelfile are for --to gguf",
    ),
    "source as output": (["student", "--to", "native", "-o", "student"], "student"),
    "shard size": (["student", "--to", "native", "-o", "out", "--max-shard-size", "big"], "'big' is not a file size"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(run, folder, what):
    arguments, message = BAD[what]
    before = sorted(folder.rglob("*"))
    code, _, err = run("export", *arguments)
    assert code == 2 and message in err
    assert sorted(folder.rglob("*")) == before and "Traceback" not in err


def test_what_a_form_cannot_hold(run, folder):
    recipe = loads("version: 1\nsteps:\n  - {op: parallel_blocks, windows: [3-4]}\n")
    run_recipe(recipe, "parent", "parallel", Options())
    for form in ("native", "nemotron-nas"):
        code, _, err = run("export", "parallel", "--to", form, "-o", "out")
        assert code == 2 and "block 3 runs 2 blocks in parallel; formats that can: surgeon" in err
        assert not (folder / "out").exists() and not (folder / "out.partial").exists()


def test_out_exists(run, folder):
    assert run("export", "student", "--to", "native", "-o", "out")[0] == 0
    code, _, err = run("export", "student", "--to", "surgeon", "-o", "out")
    assert code == 2 and "exists" in err
    assert run("export", "student", "--to", "surgeon", "-o", "out", "--overwrite")[0] == 0
    assert json.loads((folder / "out" / "config.json").read_text())["model_type"] == "surgeon_llama"


def test_export_to_gguf(run, folder):
    """The writer has tests of its own; here, that the command reaches it and its refusals."""
    code, _, err = run("export", "student", "--to", "gguf", "-o", "out.gguf", "--type", "Q3")
    assert code == 2 and "GGUF type 'Q3'" in err and not list(folder.glob("*.gguf*"))


def test_what_gguf_cannot_hold(run, folder):
    """The first block, and the forms that can hold the model; nothing is left behind."""
    recipe = loads("version: 1\nsteps:\n  - {op: prune_ffn, layers: [3]}\nformat: surgeon\n")
    run_recipe(recipe, "parent", "lone", Options())
    before = sorted(folder.rglob("*"))
    code, _, err = run("export", "lone", "--to", "gguf", "-o", "new/out.gguf")
    assert code == 2 and "format gguf cannot hold this model: block 3 has attention and no FFN" in err
    assert "formats that can: native, nemotron-nas, surgeon (a GGUF can be made of native" in err
    assert sorted(folder.rglob("*")) == before and "Traceback" not in err
    # Where another form is refused, gguf is among those that can.
    recipe = loads("version: 1\nsteps:\n  - {op: prune_attention, layers: [2]}\nformat: surgeon\n")
    save_tiny(folder / "window", "mistral", intermediate_size=256)
    run_recipe(recipe, "window", "cut", Options())
    code, _, err = run("export", "cut", "--to", "nemotron-nas", "-o", "nas")
    assert code == 2 and "block 0 has a sliding window; formats that can: native, surgeon, gguf" in err


def test_bitnet_names_the_block_that_does_not_fit(run, folder):
    code, _, err = run("export", "student", "--to", "bitnet", "-o", "packed")
    assert code == 2 and "format bitnet takes blocks of one shape: block 2 " in err and "native and surgeon" in err
    assert not (folder / "packed").exists()
