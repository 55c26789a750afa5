"""scripts/attack: what counts as wrong, and some of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from tests.attack.__main__ import KINDS
from tests.attack.mutations import mutated_json, raw
from tests.attack.scene import Ended, Scene, judge

ROOT = Path(__file__).resolve().parents[2]
MESSAGE = "error: model: num_layers must be a whole number, found null\n"


def ended(code: int | None = 0, err: str = "", signal: int | None = None, hung: bool = False) -> Ended:
    """How a command ended."""
    return Ended(code, signal, hung, "", err, 1.0)


@pytest.mark.parametrize(("how", "wrong"), [
    (ended(0), None),
    (ended(2, MESSAGE), None),
    (ended(3, "progress\nerror: the gate was missed: perplexity 9.0, at most 5\n"), None),
    (ended(2, "Usage: llmsurgeon\n\nError: No such option: --x\n"), None),
    (ended(1, 'Traceback (most recent call last):\n  File "x"\nKeyError: 5\n'), "KeyError: 5"),
    (ended(2, MESSAGE + "Exception ignored in: <function f>\nOSError: x\n"), "Exception ignored"),
    (ended(None, signal=11), "killed by SIGSEGV"),
    (ended(None, signal=9, hung=True), "hang"),
    (ended(1), "exit code 1"),
    (ended(2), "0 error messages"),
    (ended(2, MESSAGE + MESSAGE), "2 error messages"),
    (ended(0, MESSAGE), "exit code 0 and an error"),
    (ended(2, "error: 'x'\n"), "too little"),
    (ended(2, "error: " + "x" * 30_000), "characters"),
    (ended(2, "error: model\x1b[31m: there is no such folder here\n"), "control character"),
])  # fmt: skip
def test_what_counts_as_wrong(how, wrong):
    found = judge(how)
    assert found is None if wrong is None else wrong in str(found)


class Commands(Scene):
    """A scene whose command is a Python function in place of the command line."""

    def run(self, arguments, before=None, **limits):
        return super().run(["--help"], before=lambda: self.does(arguments), **limits)

    def does(self, arguments):
        os.chdir(self.work)
        for argument in arguments:
            name, _, content = argument.partition("=")
            Path(name).write_text(content) if content else Path(name).unlink()
        sys.exit(2 if "OUT=x" in arguments and "fail" in self.folder.name else 0)


@pytest.mark.parametrize(("folder", "arguments", "wrong"), [
    ("fine", ["OUT=x"], None),
    ("changes", ["input=other"], "an input was changed: input"),
    ("deletes", ["input"], "an input was changed: input"),
    ("fails", ["OUT=x"], "0 error messages"),
])  # fmt: skip
def test_inputs_stay_and_out_is_there_only_where_it_succeeded(tmp_path, folder, arguments, wrong):
    scene = Commands(tmp_path / folder, ground=None)
    scene.work.mkdir(parents=True)
    (scene.work / "input").write_text("as it was")
    found = scene.check(arguments, "nothing").wrong
    assert found == wrong if wrong is None else wrong in str(found)


def test_mutations_are_the_same_for_one_seed_and_damage_most():
    content = b'{"a": [1, 2, {"b": null}], "c": "text", "d": {"e": 0.5, "f": true}}'
    for mutate in (raw, mutated_json):
        made = [mutate(Random(seed), content) for seed in range(200)]
        assert made == [mutate(Random(seed), content) for seed in range(200)]
        assert sum(changed != content for changed, _ in made) > 180
        assert len({changed for changed, _ in made}) > 120


@pytest.mark.slow
def test_some_attacks():
    """Of every kind as many; thousands are made by hand, with other seeds."""
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    command = [str(ROOT / "scripts/attack"), "--seed", "20261126", "--tries", str(6 * len(KINDS))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    made = {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith(KINDS)}
    assert "clean" in done.stdout and made == dict.fromkeys(KINDS, 6)
