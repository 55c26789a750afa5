"""The page on the library says what the library does: its Python blocks run, one after the other, on a tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import save_encoder, save_tiny
from safetensors.torch import load_file, save_file

import llmsurgeon
from llmsurgeon import evaluate, export, inspect, run, verify
from llmsurgeon.bench import ENGINES
from llmsurgeon.cli.bench import Engine
from llmsurgeon.errors import RecipeError, SurgeryError
from llmsurgeon.recipe.recipe import load, loads
from llmsurgeon.run import Options, preview
from llmsurgeon.verify import Verified

PAGE = (Path(__file__).parents[1] / "docs" / "library.md").read_text()


def test_every_verb_has_a_part_of_the_page_with_an_example():
    parts = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
    assert set(parts) == set(llmsurgeon.__all__)
    for verb, part in parts.items():
        assert any(f"{verb}(" in block for block in re.findall(r"```python\n(.*?)```", part, re.DOTALL)), verb


@pytest.mark.slow
@pytest.mark.usefixtures("little_text")
def test_the_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMSURGEON_CACHE", str(tmp_path / "cache"))
    save_tiny(tmp_path / "MODEL", "llama", tokenizer=True, max_position_embeddings=256)
    (tmp_path / "my.txt").write_text(
        "".join(f"In year {year} the river rose {year % 97} feet. " for year in range(999))
    )
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(compile(block, "docs/library.md", "exec"), names)
    assert names["outcome"].out == Path("student") and names["healed"].results["distill"].notes()
    assert names["outcome"].planned.after.parameters < names["outcome"].planned.before.parameters
    assert names["judged"].evaluation.perplexity_ratio > 0 and names["timed"].decode_speedup.median > 0
    assert len(names["known"].layers) == names["outcome"].planned.after.blocks
    assert names["checked"].ok and not names["known"].problems
    assert all((tmp_path / name).is_dir() for name in ("analysis", "student", "healed", "student-surgeon"))
    assert "calibration: 4,096 tokens of my.txt" in capsys.readouterr().out


def test_recipes_and_models_as_a_library_may_name_them(tmp_path, monkeypatch):
    model = save_tiny(tmp_path / "model", "llama", tokenizer=True)
    steps = "steps: [{op: prune_blocks, layers: [2]}]\n"
    (tmp_path / "mine.yaml").write_text(f"version: 1\nmodel: {model}\n{steps}")
    (tmp_path / "none.yaml").write_text(f"version: 1\n{steps}")
    assert preview(str(tmp_path / "mine.yaml"), None).after.blocks == 5
    outcomes = [
        run(tmp_path / "mine.yaml", None, tmp_path / "one"),
        run(str(tmp_path / "none.yaml"), model, str(tmp_path / "two")),
        run(load(tmp_path / "none.yaml"), str(model), tmp_path / "three", Options()),
    ]
    assert {outcome.planned.after for outcome in outcomes} == {preview(tmp_path / "none.yaml", model).after}
    names = {(tmp_path / name / "config.json").read_bytes() for name in ("one", "two", "three")}
    assert len(names) == 1
    with pytest.raises(SurgeryError, match="no model: name one on the command line or in the recipe"):
        run(tmp_path / "none.yaml", None, tmp_path / "four")
    with pytest.raises(RecipeError, match="no-such-recipe"):
        run("no-such-recipe", model, tmp_path / "four")
    # The recipe is read, so it must survive what is written.
    (tmp_path / "mine.yaml").rename(tmp_path / "one" / "recipe.yaml")
    with pytest.raises(SurgeryError, match=r"recipe\.yaml, which this run reads"):
        run(tmp_path / "one" / "recipe.yaml", model, tmp_path / "one", Options(overwrite=True))


def test_words_that_a_verb_does_not_know_are_said_in_a_sentence(tmp_path):
    model = save_tiny(tmp_path / "model", "llama", tokenizer=True)
    encoder = save_encoder(tmp_path / "encoder", "bert")
    (tmp_path / "text.txt").write_text("A sentence of some words, and one more. " * 40)
    with pytest.raises(SurgeryError, match=r"form gguf: expected one of native, .*; export_gguf writes GGUF files"):
        export(model, tmp_path / "out", "gguf")
    recipe = loads("version: 1\nsteps: [{op: prune_blocks, layers: [2]}]\n")
    with pytest.raises(SurgeryError, match="device foo: cannot be used here"):
        run(recipe, model, tmp_path / "out", Options(device="foo"))
    for pair in ((model, encoder), (encoder, model)):
        with pytest.raises(SurgeryError, match=r"encoder is an encoder and .*model predicts the next token"):
            evaluate(*pair, text=str(tmp_path / "text.txt"), tokens=128, sequence_length=16)
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_with_a_checkpoint_is_returned(tmp_path):
    model = save_tiny(tmp_path / "model", "llama", tokenizer=True)
    config = tmp_path / "config.json"
    config.write_bytes((model / "config.json").read_bytes())
    whole, alone = inspect(model), inspect(config)
    assert whole.costs == alone.costs and len(whole.layers) == 6 and not whole.problems
    assert whole.layers[0].ternary == () and alone.layers[0].ternary is None
    assert json.loads(json.dumps(whole.to_dict()))["layers"][5]["block"] == 5
    assert verify(model) == Verified(model)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float("nan"))
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    damaged = verify(model)
    assert not damaged.ok and damaged.problems[0].startswith("tensor model.norm.weight holds NaN or infinity")
    weights["model.norm.weight"] = torch.ones(3)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert "model.norm.weight" in verify(model).problems[0]
    (problem,) = inspect(model).problems
    assert "model.norm.weight" in problem and inspect(model).layers[5].parameters == alone.layers[5].parameters
    with pytest.raises(SurgeryError, match="is a file; verify takes the folder of a checkpoint"):
        verify(config)
    with pytest.raises(SurgeryError):
        inspect(tmp_path / "none")


def test_the_command_line_offers_every_engine():
    assert [engine.value for engine in Engine] == list(ENGINES)
