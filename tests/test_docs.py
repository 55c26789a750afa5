"""The documentation says what the program does."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

import pytest

from llmsurgeon.cli.main import main
from llmsurgeon.operations import OPERATIONS
from llmsurgeon.recipe.recipe import Calibration, Gate, Recipe, loads

ROOT = Path(__file__).parents[1]
RECIPES = (ROOT / "docs" / "recipes.md").read_text()


def test_the_cli_reference_is_up_to_date():
    command = [sys.executable, ROOT / "scripts" / "gen_cli_docs.py", "--check"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_table_of_families_is_up_to_date():
    command = [sys.executable, ROOT / "scripts" / "gen_family_docs.py", "--check"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_tree_of_the_architecture_is_up_to_date():
    command = [sys.executable, ROOT / "scripts" / "gen_architecture_docs.py", "--check"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_tables_of_the_architecture_exist():
    page = (ROOT / "docs" / "architecture.md").read_text().partition("## Tables")[2].partition("\n## ")[0]
    named = re.findall(r"`((?:\w+\.)+)([A-Z]+)`", page)
    assert len(named) >= 8
    for module, table in named:
        if not module.startswith("surgeon_blocks"):
            assert isinstance(getattr(import_module(f"llmsurgeon.{module[:-1]}"), table), Mapping), (module, table)


def test_the_readme_is_a_page():
    assert len((ROOT / "README.md").read_text().split()) < 1300


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text())
    missing = [link for link in links if not ((ROOT / page).parent / link).exists()]
    assert not missing


def test_the_example_recipe_loads():
    (example,) = re.findall(r"```yaml\n(.*?)```", RECIPES, re.DOTALL)
    assert len(loads(example).steps) == 3


@pytest.mark.parametrize(
    "line", re.findall(r"^    llmsurgeon (recipes (?:ls|show|check ultra).*)$", RECIPES, re.MULTILINE)
)
def test_the_commands_run(line):
    arguments = shlex.split(line.split("   ")[0])
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert not exit_.value.code


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_step_and_key_is_described(name):
    (row,) = re.findall(rf"^\| `{name}` \|.*$", RECIPES, re.MULTILINE)
    for key in OPERATIONS[name].model_fields:
        assert key == "op" or f"`{key}`" in row, key


@pytest.mark.parametrize("part", [Recipe, Calibration, Gate])
def test_every_recipe_key_is_described(part):
    for key in part.model_fields:
        assert f"`{key}`" in RECIPES, key
