"""Caches and intermediate results that were damaged: made again, with a line that says so, and never believed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXT, byte_tokenizer, save_tiny, tiny_model
from healing.distill.test_distill import case_of, settings_of

from llmsurgeon import progress
from llmsurgeon.healing.distill.data import Text, read_rows
from llmsurgeon.healing.distill.distill import distill
from llmsurgeon.healing.distill.loop import Trainer
from llmsurgeon.healing.distill.targets import StoredTargets, Wanted
from llmsurgeon.recipe.recipe import loads
from llmsurgeon.run import Options, run
from llmsurgeon.text.cache import cached_self_text
from llmsurgeon.text.self_text import SelfText


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMSURGEON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def blank(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES = {"half": halve, "zeros": blank, "gone": Path.unlink}


@pytest.mark.parametrize("damage", DAMAGES)
def test_tokens(cache, tmp_path, capsys, damage):
    (tmp_path / "a.txt").write_text("abc def\n" * 200)
    first = np.array(read_rows(byte_tokenizer(), 5, Text(text=str(tmp_path / "a.txt"))).tokens)
    [file] = (cache / "tokens").glob("*.u32")
    DAMAGES[damage](file)
    again = read_rows(byte_tokenizer(), 5, Text(text=str(tmp_path / "a.txt"))).tokens
    assert np.array_equal(again, first)
    assert ("is damaged" in capsys.readouterr().err) == (damage != "gone")


@pytest.mark.parametrize("damage", ["half", "zeros"])
def test_sampled_text(cache, capsys, damage):
    model, wanted = tiny_model("llama"), SelfText(64, 16, kinds=("prose",))
    first = cached_self_text(lambda: model, byte_tokenizer(), "key", wanted)
    [file] = (cache / "self").glob("*.safetensors")
    DAMAGES[damage](file)
    again = cached_self_text(lambda: model, byte_tokenizer(), "key", wanted)
    assert torch.equal(again.tokens, first.tokens)
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["hidden-0", "top_ids", "hidden-3.json", "known"])
def test_what_the_parent_said(tmp_path, cache, capsys, damage, name):
    """Prepared anew before a group of rows is used, and where a resumed run does not prepare, when it is read."""
    case = case_of(tmp_path)
    corpus, wanted, numbers = case.corpus(0), Wanted((0, 3), 6), np.array([5, 0, 9, 63])
    tokens = corpus.tokens(numbers)

    def made():
        return StoredTargets(corpus, lambda: case.parent, "p", wanted, 2)

    targets = made()
    targets.prepare(numbers)
    first = targets.of(numbers, tokens)
    assert all(value.abs().sum() > 0 for value in first.values())
    for prepares in (True, False):
        [file] = cache.rglob(name)
        DAMAGES[damage](file)
        progress._said.clear()
        again = made()
        if prepares:
            again.prepare(numbers)
        found = again.of(numbers, tokens)
        assert all(torch.equal(found[key], value) for key, value in first.items()), prepares
        # Without its flags it is as if nothing had ever been asked.
        assert ("is damaged or gone" in capsys.readouterr().err) == (name != "known")


STEPS = {
    "refit": "{op: prune_blocks, layers: [2]}, {op: refit}",
    "ternary": "{op: ternary, layers: [1, 2]}",
    "block": "{op: block, block_length: 2}, {op: refit}",
}


@pytest.mark.parametrize("damage", ["half", "zeros"])
@pytest.mark.parametrize("steps", STEPS)
def test_fitted_blocks(tmp_path, monkeypatch, capsys, steps, damage):
    parent = save_tiny(tmp_path / "parent", "llama", tokenizer=True)
    (tmp_path / "text.txt").write_text(TEXT)
    wanted = loads(
        f"version: 1\ncalibration: {{text: {tmp_path}/text.txt, tokens: 512, sequence_length: 16}}\n"
        f"steps: [{STEPS[steps]}]\n"
    )
    whole = run(wanted, str(parent), str(tmp_path / "whole"), Options()).out
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        for judge in ("judge", "judge_whole"):
            patch.setattr(f"llmsurgeon.planning.healed.{judge}", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        run(wanted, str(parent), str(tmp_path / "out"), Options())
    kept = (tmp_path / "out.partial").rglob("*.safetensors")
    files = sorted(file for file in kept if file.name.startswith(("layer-", "block-transformer")))
    DAMAGES[damage](files[len(files) // 2])
    capsys.readouterr()
    out = run(wanted, str(parent), str(tmp_path / "out"), Options()).out
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert capsys.readouterr().err.count("is damaged") == 1


class Killed(Exception):
    """In place of a signal."""


def killed_at(step, monkeypatch):
    real = Trainer._step

    def dying(self, reached):
        if self.state.step == step:
            raise Killed
        return real(self, reached)

    monkeypatch.setattr(Trainer, "_step", dying)


def tensors_of(made):
    from safetensors.torch import load_file

    [file] = set(made.files.values())
    return load_file(file)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("pattern", ["state-*/model.safetensors", "state-*/optimizer.bin", "state-*/loop.json"])
def test_the_state_of_a_training(tmp_path, monkeypatch, capsys, damage, pattern):
    settings = settings_of(steps=12, save_steps=5)
    (tmp_path / "a").mkdir()
    whole = distill(case_of(tmp_path / "a"), settings)
    (tmp_path / "b").mkdir()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(8, patch)
        distill(case_of(tmp_path / "b"), settings)
    [file] = (tmp_path / "b").glob(pattern)
    DAMAGES[damage](file)
    capsys.readouterr()
    again = distill(case_of(tmp_path / "b"), settings)
    assert "is damaged" in capsys.readouterr().err
    assert all(torch.equal(tensors_of(again)[name], t) for name, t in tensors_of(whole).items())


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("changes", [{}, {"mode": "local"}], ids=["global", "local"])
def test_the_result_of_a_training(tmp_path, capsys, damage, changes):
    """A later step of the recipe was killed: what was trained before it counts only where it is whole."""
    settings = settings_of(steps=6, **changes)
    first = distill(case_of(tmp_path), settings)
    before = {file: file.read_bytes() for file in first.files.values()}
    again = distill(case_of(tmp_path), settings)
    assert again.files == first.files and "is damaged" not in capsys.readouterr().err
    DAMAGES[damage](next(iter(before)))
    again = distill(case_of(tmp_path), settings)
    assert again.files == first.files
    assert {file: file.read_bytes() for file in again.files.values()} == before


def test_the_best_weights_so_far(tmp_path, monkeypatch, capsys):
    settings = settings_of(steps=12, save_steps=5, evaluations=3)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(8, patch)
        distill(case_of(tmp_path), settings)
    # The one that the saved state names; a later one is not known to it.
    halve(min(tmp_path.glob("best-*.safetensors"), key=lambda path: path.stat().st_mtime))
    made = distill(case_of(tmp_path), settings)
    assert "the best weights so far are damaged" in capsys.readouterr().err
    _, training = made.trainings[0]
    assert training.best_step and len(tensors_of(made)) > 0
