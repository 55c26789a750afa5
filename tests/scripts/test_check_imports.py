"""The import-arrow check holds for this package, and fails where an arrow is broken."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_imports.py"


@pytest.fixture(scope="module")
def checker():
    import sys

    spec = importlib.util.spec_from_file_location("check_imports", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_imports"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["check_imports"]


def test_the_package_keeps_the_arrows(checker):
    assert list(checker.violations(SCRIPT.parents[1])) == []


@pytest.mark.parametrize(
    ("path", "code", "message"),
    [
        (
            "model/x.py",
            "import os\nfrom llmsurgeon.operations import OPERATIONS",
            ":2: model must not import",
        ),
        ("model/x.py", "def f():\n    from llmsurgeon.run import run", ":2: model must not import"),
        ("model/x.py", "from llmsurgeon import run", ":1: model must not import llmsurgeon.run"),
        (
            "model/x.py",
            "from ..operations import fuse_ffn",
            ":1: model must not import llmsurgeon.operations",
        ),
        ("operations/x.py", "from llmsurgeon.checkpoint.writer import W", ":1: operations must not import"),
        ("operations/x.py", "def f():\n    import transformers.models", ":2: operations must not know transformers"),
        ("modeling/x.py", "from llmsurgeon.model.spec import ModelSpec", ":1: modeling must not import"),
        ("run.py", "import llmsurgeon.cli.main", ":1: run must not import llmsurgeon.cli.main"),
        ("checkpoint/x.py", "if True:\n    import llmsurgeon.formats.write", ":2: checkpoint must not import"),
        ("cli/x.py", "import torch", ":1: cli imports torch at the top of a file"),
        (
            "cli/x.py",
            "from llmsurgeon.recipe.recipe import load",
            ":1: cli imports llmsurgeon.recipe.recipe at the top",
        ),
        ("novel.py", "", ":1: novel has no entry in ARROWS"),
    ],
)
def test_a_broken_arrow_is_found(checker, tmp_path, path, code, message):
    file = tmp_path / "llmsurgeon" / path
    file.parent.mkdir(parents=True)
    file.write_text(code)
    (found,) = checker.violations(tmp_path)
    assert found.startswith(f"llmsurgeon/{path}:")
    assert message in found


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("operations/x.py", "from llmsurgeon.checkpoint.transform import WeightTransform\nimport torch"),
        ("modeling/x.py", "from .surgeon_blocks import Block\nimport transformers"),
        ("cli/x.py", "import typer\nfrom llmsurgeon.cli import say\ndef f():\n    import torch"),
        ("cli/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("cli/x.py", "from llmsurgeon import __version__"),
    ],
)
def test_what_is_allowed_passes(checker, tmp_path, path, code):
    file = tmp_path / "llmsurgeon" / path
    file.parent.mkdir(parents=True)
    file.write_text(code)
    assert list(checker.violations(tmp_path)) == []


def test_exit_code_and_output(checker, monkeypatch, capsys):
    monkeypatch.setattr(checker, "violations", lambda root: ["a.py:1: broken"])
    assert checker.main() == 1
    assert capsys.readouterr().out == "a.py:1: broken\n"
