"""Flags and arguments that no recipe could hold end in one sentence that names them, whatever verb is asked."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import save_tiny

from llmsurgeon import analyze, bench, evaluate
from llmsurgeon.cli.main import main
from llmsurgeon.errors import RecipeError, SurgeryError

RECIPE = "version: 1\ncalibration: {tokens: 64, sequence_length: 16}\nsteps: [{op: prune_blocks, layers: [1]}]\n"
SET = ("--set", "calibration.tokens=2", "--set", "calibration.sequence_length=16")
SHORT = ("--tokens", "2", "--seq-len", "16")
BOTH = ("--text", "text.txt", "--dataset", "lab/prose")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flags")
    save_tiny(folder / "model", "llama", tokenizer=True)
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    (folder / "mine.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(autouse=True)
def inside(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LLMSURGEON_CACHE", str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("analyze", "model", *SHORT), "--tokens.*--seq-len"),
        (("analyze", "model", "--tokens", "2"), "--tokens.*--seq-len"),
        (("analyze", "model", *BOTH), "text or dataset, not both"),
        (("eval", "model", *SHORT), "--tokens.*--seq-len"),
        (("eval", "model", "--tokens", "2"), "--tokens.*--seq-len"),
        (("eval", "model", *BOTH), "text or dataset, not both"),
        (("run", "mine.yaml", "model", *SHORT), "--tokens.*--seq-len"),
        (("run", "mine.yaml", "model", "--tokens", "2"), "--tokens.*--seq-len"),
        (("run", "mine.yaml", "model", *BOTH), "--text or --dataset, not both"),
        (("fuse", "model", *SHORT), "--tokens.*--seq-len"),
        (("fuse", "model", *BOTH), "--text or --dataset, not both"),
        (("fuse", "model", "--max-run", "1"), "fuse_ffn.max_run"),
        (("fuse", "model", "--norm", "first"), "fuse_ffn.norm"),
        (("fuse", "model", "--drop-count", "0"), "prune_attention.count"),
        (("fuse", "model", "--drop-attention", "x"), "prune_attention.layers"),
        (("prune", "model", "--blocks", "1", *SHORT), "--tokens.*--seq-len"),
        (("prune", "model", "--blocks", "3-1"), "prune_blocks.layers"),
        (("prune", "model", "--block-count", "-1"), "prune_blocks.count"),
        (("prune", "model", "--kv-heads", "0"), "prune_kv_heads.kv_heads"),
        (("prune", "model", "--width", "0"), "prune_width.width"),
        (("prune", "model", "--vocab", "0"), "trim_vocab.rows"),
        (("fff", "model", "--keep", "0.5", *SHORT), "--tokens.*--seq-len"),
        (("fff", "model", "--keep", "nan"), "fff.keep"),
        (("fff", "model", "--keep", "0.5", "--form", "tree"), "fff.form"),
        (("ternary", "model", *SHORT), "--tokens.*--seq-len"),
        (("ternary", "model", "--share", "inf"), "ternary.share"),
        (("ternary", "model", "--granularity", "group", "--group-size", "33"), "ternary.group_size"),
        (("matmulfree", "model", *SHORT), "--tokens.*--seq-len"),
        (("matmulfree", "model", "--count", "0"), "matmulfree.count"),
        (("matmulfree", "model", "--linears", "int8"), "matmulfree.linears"),
        (("block", "model", *SHORT), "--tokens.*--seq-len"),
        (("block", "model", "--block-length", "3"), "block.block_length"),
        (("block", "model", "--minutes", "nan"), "distill.minutes"),
        (("heal", "model", "--parent", "model", "--minutes", "0"), "distill.minutes"),
        (("heal", "model", "--parent", "model", *SET), "calibration.tokens.*calibration.sequence_length"),
        (("heal", "model", "--parent", "model", *BOTH), "--text or --dataset, not both"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_flags_that_no_recipe_could_hold(capsys, arguments, named):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("calibration:")]
    assert stop.value.code == 2 and not out
    assert len(lines) == 1 and lines[0].startswith("error: ") and re.search(named, lines[0]), err
    # Nobody has seen the file that the flags stand for.
    assert not re.search("(flags|defaults):", err) and "pydantic" not in err
    assert not list(Path(".").glob("*.partial"))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"tokens": 2, "sequence_length": 16}, r"tokens \(2\) must cover one sequence_length \(16\)"),
        ({"tokens": 0}, r"calibration\.tokens: expected greater than or equal to 1, got 0"),
        ({"sequence_length": 0}, r"calibration\.sequence_length: expected greater than or equal to 2, got 0"),
        ({"seed": -1}, r"calibration\.seed: expected greater than or equal to 0, got -1"),
        ({"text": "text.txt", "dataset": "lab/prose"}, "takes text or dataset, not both"),
    ],
)
def test_arguments_of_the_verb_that_no_recipe_could_hold(values, named):
    with pytest.raises(RecipeError, match=f"^options: {named}" if "." in named else named) as error:
        analyze("model", "out", **values)
    assert len(str(error.value).splitlines()) == 1 and not Path("out").exists() and not Path("out.partial").exists()


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: evaluate("model", tokens=2, sequence_length=16), "--tokens.*--seq-len"),
        (lambda: evaluate("model", sequence_length=1), "sequence_length is 1, expected 2 or more"),
        (lambda: evaluate("model", text="none.txt"), "none.txt: no such text file"),
        (lambda: evaluate("model", dtype="int8"), "--dtype int8: expected one of float32"),
        (lambda: evaluate("model", device="abacus"), "device abacus: cannot be used here"),
        (lambda: analyze("model", "out", text="none.txt"), "none.txt: no such text file"),
        (lambda: analyze("model", "out", dtype="int8"), "--dtype int8: expected one of float32"),
        (lambda: analyze("model", "out", device="abacus"), "device abacus: cannot be used here"),
        (lambda: bench("model", engine="abacus"), "--engine abacus: expected one of transformers, llama.cpp"),
        (lambda: bench("model", threads=0), "--threads 0: expected 1 to"),
        (lambda: bench("model", prompt=0), "bench: prompt is 0, expected 1 or more"),
        (lambda: bench("model", device="abacus"), "device abacus: cannot be used here"),
    ],
)
def test_arguments_that_cannot_be(call, named):
    with pytest.raises(SurgeryError, match=named):
        call()
    assert not Path("out").exists()
