"""A model of few positions: what is left open fits it in every command, and what is asked for beyond it is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from conftest import save_encoder, save_tiny
from typer.testing import CliRunner

from llmsurgeon.cli.main import app
from llmsurgeon.errors import SurgeryError
from llmsurgeon.planning.checks import within_positions
from llmsurgeon.planning.opened import open_model
from llmsurgeon.recipe.recipe import loads

FEW = 24
TEXT = ["--text", "text.txt"]


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Run a command in a folder of its own and return its result."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMSURGEON_CACHE", str(tmp_path / "cache"))
    Path("text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 80)
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.mark.usefixtures("little_text")
@pytest.mark.parametrize("family", ("gpt2", "llama"))
def test_defaults_fit_in_every_command(tmp_path, call, family):
    parent = save_tiny(tmp_path / "parent", family, tokenizer=True, max_position_embeddings=FEW)
    for arguments in (
        ["analyze", parent, *TEXT, "--tokens", 480, "-o", "found"],
        ["fuse", parent, *TEXT, "--tokens", 480, "--drop-count", 1, "-o", "out"],
        [
            "heal",
            "out",
            "--parent",
            parent,
            *TEXT,
            "--set",
            "distill.steps=2",
            "--set",
            "distill.batch=2",
            "-o",
            "healed",
        ],
        ["eval", "healed", "--against", parent, *TEXT, "--tokens", 480],
        ["bench", "healed", "--against", parent, "--rounds", 1],
        ["bench", parent, "--rounds", 1, "--prompt", 20],
        ["bench", parent, "--rounds", 1, "--new-tokens", 20],
        ["run", "out/recipe.yaml", parent, "-o", "again"],
    ):
        result = call(*arguments)
        assert result.exit_code == 0, (arguments, result.output, result.exception)
    for written in ("found/suggested.yaml", "out/recipe.yaml"):
        assert yaml.safe_load(Path(written).read_text())["calibration"]["sequence_length"] == FEW
    distilled = next(s for s in yaml.safe_load(Path("healed/recipe.yaml").read_text())["steps"] if s["op"] == "distill")
    assert distilled["sequence_length"] == FEW


def test_what_is_asked_for_is_not_lowered(tmp_path, call):
    parent = save_tiny(tmp_path / "parent", "llama", tokenizer=True, max_position_embeddings=FEW)
    over = FEW + 1
    for arguments in (
        ["analyze", parent, *TEXT, "--seq-len", over, "-o", "found"],
        ["fuse", parent, *TEXT, "--seq-len", over, "--drop-count", 1, "-o", "out"],
        ["eval", parent, *TEXT, "--seq-len", over],
        ["bench", parent, "--prompt", over],
        ["bench", parent, "--new-tokens", over],
    ):
        error = call(*arguments).exception
        assert isinstance(error, SurgeryError) and f"{FEW}" in str(error) and "lower" in str(error), arguments


def test_encoders(tmp_path, call):
    """RoBERTa's first positions are reserved: 64 hold 63 tokens with padding token 0."""
    parent = save_encoder(tmp_path / "parent", "roberta", "RobertaForMaskedLM")
    recipe = loads("version: 1\nsteps: [{op: distill}]\n")
    opened = open_model(str(parent))
    assert within_positions(opened, recipe).calibration.sequence_length == opened.spec.max_positions == 63
    assert recipe.steps[0].resolve(opened.subject({})).sequence_length == 63
    assert call("eval", parent, *TEXT).exit_code == 0
    bench = call("bench", parent, "--rounds", 1, "--json")
    assert json.loads(bench.stdout)["prompt"] == 63


def test_fewer_tokens_than_the_default_window(tmp_path):
    recipe = loads("version: 1\ncalibration: {tokens: 96}\nsteps: [{op: refit}]\n")
    parent = open_model(str(save_tiny(tmp_path / "parent", "llama")))
    assert within_positions(parent, recipe).calibration.sequence_length == 96
