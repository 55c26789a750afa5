"""The arrows between rooms hold, are seen where they break, and no two files import each other."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import networkx
import pytest

ROOT = Path(__file__).parents[1]
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"


def lint(root: Path) -> tuple[int, str]:
    """Exit code and words of import-linter for the package under `root`."""
    command = [sys.executable, "-c", LINT, "--no-cache", "--no-logo", str(ROOT / "pyproject.toml")]
    ended = subprocess.run(
        command, cwd=root, env={"PYTHONPATH": str(root), "COLUMNS": "200"}, capture_output=True, text=True
    )
    return ended.returncode, ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    root = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "llmsurgeon", root / "llmsurgeon", ignore=shutil.ignore_patterns("__pycache__"))
    return root


def test_the_package_keeps_the_arrows(copy):
    code, said = lint(copy)
    assert code == 0 and " 0 broken" in said, said


FOR_TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from llmsurgeon.progress import bar"


@pytest.mark.parametrize(
    ("path", "code", "imported"),
    [
        ("model/x.py", "import os\nfrom llmsurgeon.operations import OPERATIONS", "llmsurgeon.operations (l.2)"),
        ("model/x.py", "def f():\n    from llmsurgeon.run import run", "llmsurgeon.run (l.2)"),
        ("model/x.py", "from llmsurgeon import run", "llmsurgeon.run (l.1)"),
        ("model/x.py", "from ..operations import fuse_ffn", "llmsurgeon.operations.fuse_ffn (l.1)"),
        ("model/x.py", FOR_TYPES, "llmsurgeon.progress (l.3)"),
        ("operations/x.py", "from llmsurgeon.checkpoint.writer import W", "llmsurgeon.checkpoint.writer (l.1)"),
        ("operations/x.py", "def f():\n    import transformers.models", "transformers (l.2)"),
        ("modeling/x.py", "from llmsurgeon.model.spec import ModelSpec", "llmsurgeon.model.spec (l.1)"),
        ("recipe/x.py", "from llmsurgeon.formats.forms import FORMATS", "llmsurgeon.formats.forms (l.1)"),
        ("analysis/x.py", "import llmsurgeon.report.charts", "llmsurgeon.report.charts (l.1)"),
        ("walk/x.py", "from llmsurgeon.text.files import check", "llmsurgeon.text.files (l.1)"),
        ("verify.py", "import llmsurgeon.cli.main", "llmsurgeon.cli.main (l.1)"),
        ("checkpoint/x.py", "if True:\n    import llmsurgeon.formats.write", "llmsurgeon.formats.write (l.2)"),
        ("novel.py", "", None),
    ],
)
def test_a_broken_arrow_is_found(copy, path, code, imported):
    file = copy / "llmsurgeon" / path
    before = file.read_text() if file.exists() else None
    file.write_text(code)
    try:
        status, said = lint(copy)
    finally:
        file.unlink()
        if before is not None:
            file.write_text(before)
    module = f"llmsurgeon.{path.removesuffix('.py').replace('/', '.')}"
    assert status == 1 and (f"{module} -> {imported}" if imported else "novel") in said, said


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("operations/x.py", "from llmsurgeon.checkpoint.transform import WeightTransform\nimport torch"),
        ("modeling/x.py", "from .surgeon_blocks import Block\nimport transformers"),
        ("report/x.py", "from llmsurgeon import __version__"),
    ],
)
def test_what_is_allowed_passes(copy, path, code):
    file = copy / "llmsurgeon" / path
    file.write_text(code)
    try:
        status, said = lint(copy)
    finally:
        file.unlink()
    assert status == 0, said


def circles(graph: grimp.ImportGraph) -> list[list[str]]:
    """Files that import each other, be it inside a function or for types; the package itself stands for its version."""
    found = networkx.DiGraph()
    for module in graph.modules - {"llmsurgeon"}:
        found.add_edges_from((module, other) for other in graph.find_modules_directly_imported_by(module))
    found.remove_nodes_from(["llmsurgeon"])
    return sorted(sorted(part) for part in networkx.strongly_connected_components(found) if len(part) > 1)


def test_no_two_files_import_each_other():
    assert circles(grimp.build_graph("llmsurgeon", cache_dir=None)) == []


def test_a_circle_is_found():
    graph = grimp.ImportGraph()
    for importer, imported in (("a", "b"), ("b", "c"), ("c", "a"), ("c", "d")):
        graph.add_import(importer=importer, imported=imported)
    assert circles(graph) == [["a", "b", "c"]]
