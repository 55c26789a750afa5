"""Models that memory does not hold have the figures that they would have in it."""

from __future__ import annotations

import sys

import pytest
from conftest import save_encoder, save_tiny

from llmsurgeon.errors import SurgeryError
from llmsurgeon.evaluate import evaluate
from llmsurgeon.evaluation import layerwise, pair
from llmsurgeon.walk.memory import Room

TEXT = "A sentence of some words, and one more of others; then a third, for the windows. " * 60


@pytest.fixture
def models(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    save_tiny(tmp_path / "parent", "llama", tokenizer=True)
    save_tiny(tmp_path / "student", "llama", tokenizer=True, seed=1)
    return tmp_path


def small(monkeypatch, free):
    monkeypatch.setattr(layerwise, "room", lambda: Room(free, "a test"))


def figures(folder, *models, **options):
    made = evaluate(
        *(folder / name for name in models), text=folder / "text.txt", tokens=512, sequence_length=32, **options
    )
    found = made.evaluation.to_dict()
    between = {name: value or () for name, value in found.items() if "interval" in name}
    bounds = {f"{name} {end}": bound for name, value in between.items() for end, bound in enumerate(value)}
    return {name: value for name, value in found.items() if name not in between and value is not None} | bounds


@pytest.mark.parametrize("names", [("student",), ("student", "parent")])
def test_the_figures_are_those_of_models_in_memory(names, models, monkeypatch, capsys):
    small(monkeypatch, 10**12)
    expected = figures(models, *names)
    assert "one at a time" not in capsys.readouterr().err
    small(monkeypatch, 1000)
    found = figures(models, *names)
    assert "are free (a test): layers are read one at a time" in capsys.readouterr().err
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert found["sequences"] == expected["sequences"] == 16


def test_an_encoder_beside_its_parent(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT)
    save_encoder(tmp_path / "parent", "bert")
    save_encoder(tmp_path / "student", "bert", seed=1)
    expected = figures(tmp_path, "student", "parent")
    small(monkeypatch, 1000)
    found = figures(tmp_path, "student", "parent")
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    save_encoder(tmp_path / "alone", "bert", "BertForMaskedLM")
    with pytest.raises(SurgeryError, match="such an encoder is judged beside its parent alone; give --against"):
        figures(tmp_path, "alone")


@pytest.mark.parametrize(("asked", "said"), [
    ({"text": None}, "and sampling text needs it in memory as a whole; give --text"),
    ({"text": "text.txt", "tasks": ["x"]}, "and --tasks needs the model in memory as a whole"),
])  # fmt: skip
def test_what_needs_the_whole_model_is_refused(asked, said, models, monkeypatch):
    small(monkeypatch, 1000)
    monkeypatch.setattr(sys.modules["llmsurgeon.evaluate"], "check_tasks_available", lambda: None)
    text = asked["text"] and models / asked["text"]
    with pytest.raises(SurgeryError, match=said):
        evaluate(models / "student", text=text, tokens=512, sequence_length=32, tasks=asked.get("tasks", ()))


def test_models_of_other_vocabularies_are_refused(models, monkeypatch):
    save_tiny(models / "other", "llama", tokenizer=True, vocab_size=300)
    small(monkeypatch, 1000)
    with pytest.raises(SurgeryError, match=r"layer by layer only models of one tokenizer .* are compared"):
        figures(models, "other", "parent")


@pytest.mark.parametrize("free", [10**12, 1000])
def test_each_checkpoint_is_opened_once(free, models, monkeypatch):
    """The hub is asked for one that lies there each time."""
    small(monkeypatch, free)
    opened, plain = [], pair.open_checkpoint
    monkeypatch.setattr(pair, "open_checkpoint", lambda model, **more: opened.append(model) or plain(model, **more))
    figures(models, "student", "parent")
    assert opened == [str(models / "student"), str(models / "parent")]
