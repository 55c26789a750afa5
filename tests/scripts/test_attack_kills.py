"""The kills of scripts/attack: clean on this code, and wrong where its guarantees are taken away."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmsurgeon.checkpoint.journal import Journal
from llmsurgeon.checkpoint.staging import Staging
from tests.attack import kills
from tests.attack.ground import Ground
from tests.attack.scene import Scene

LAST = 6


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Ground:
    import transformers

    import llmsurgeon.cli.main
    import llmsurgeon.export  # noqa: F401 - what the forked commands import, imported once

    assert transformers.LlamaForCausalLM and transformers.PreTrainedTokenizerFast
    return Ground(tmp_path_factory.mktemp("ground"))


def verdicts(ground: Ground, folder: Path, name: str = "export") -> list[str]:
    """What is wrong where the command is killed at one of the last calls, in which OUT appears."""
    calls = kills.undisturbed(name, Scene(folder / "none", ground)).calls
    found = [kills.killed(name, [calls - n], Scene(folder / f"{n}", ground)).wrong for n in range(LAST)]
    return [wrong for wrong in found if wrong]


@pytest.mark.slow
def test_nothing_is_wrong(ground, tmp_path):
    assert verdicts(ground, tmp_path) == []


@pytest.mark.slow
def test_what_a_kill_leaves_behind_is_found(ground, tmp_path, monkeypatch):
    monkeypatch.setattr(Staging, "_finish_commit", lambda stage: None)
    monkeypatch.setattr(Journal, "worth", lambda journal: True)
    assert any("OUT.partial" in wrong for wrong in verdicts(ground, tmp_path))


@pytest.mark.slow
def test_a_result_that_appears_by_and_by_is_found(ground, tmp_path, monkeypatch):
    def by_and_by(stage):
        stage.out.mkdir()
        for path in stage.path.iterdir():
            path.rename(stage.out / path.name)
        stage.path.rmdir()

    monkeypatch.setattr(Staging, "_swap", by_and_by)
    assert any("neither what it was nor whole" in wrong for wrong in verdicts(ground, tmp_path))
