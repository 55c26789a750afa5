"""The verbs are functions of the package, whatever is imported first, and cost nothing before one is asked for."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from inspect import getdoc, isfunction, signature
from pathlib import Path
from types import ModuleType

import pytest

import llmsurgeon

VERBS = ("analyze", "bench", "evaluate", "export", "heal", "inspect", "run", "search", "verify")
HEAVY = ("torch", "transformers", "pydantic", "numpy", "yaml", "typer", "rich")


def fresh(code: str) -> str:
    """What the code prints in an interpreter of its own."""
    made = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert made.returncode == 0, made.stderr
    return made.stdout


def test_the_top_of_the_package_is_the_list_of_verbs():
    assert tuple(llmsurgeon.__all__) == VERBS
    files = {path.stem for path in Path(llmsurgeon.__file__).parent.glob("*.py")}
    assert files == {*VERBS, "errors", "progress", "__init__", "__main__"}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_is_a_documented_function(verb):
    function, module = getattr(llmsurgeon, verb), import_module(f"llmsurgeon.{verb}")
    assert isfunction(function) and isinstance(module, ModuleType) and getattr(module, verb) is function
    assert getattr(llmsurgeon, verb) is function
    assert "Raises:" in getdoc(function)
    assert all(parameter.annotation is not parameter.empty for parameter in signature(function).parameters.values())


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, llmsurgeon; dir(llmsurgeon); print([name for name in {} if name in sys.modules])"
    assert fresh(code.format(HEAVY)) == "[]\n"


@pytest.mark.parametrize(
    "first",
    [
        "import llmsurgeon.{0}",
        "from llmsurgeon import {0}",
        "import llmsurgeon; llmsurgeon.{0}",
    ],
)
def test_whichever_is_imported_first_the_name_is_the_function(first):
    then = "import sys, llmsurgeon.{0}; from llmsurgeon import {0}; print({0}.__qualname__, {0}.__module__)"
    again = "print(type(sys.modules['llmsurgeon.{0}']).__name__, sys.modules['llmsurgeon.{0}'].{0} is {0})"
    call = "from llmsurgeon.errors import SurgeryError\ntry: verify('none')\nexcept SurgeryError as e: print(e)"
    lines = [line.format(verb) for verb in VERBS for line in (first, then, again)]
    told = fresh("\n".join([*lines, call])).splitlines()
    assert told[:-1] == [line for verb in VERBS for line in (f"{verb} llmsurgeon.{verb}", "module True")]
    assert told[-1] == "none: no such folder; verify takes the folder of a checkpoint"


def test_names_that_are_no_verbs():
    with pytest.raises(AttributeError, match="module 'llmsurgeon' has no attribute 'runn'"):
        _ = llmsurgeon.runn
    with pytest.raises(ImportError):
        exec("from llmsurgeon import runn")
    assert {*VERBS, "__version__"} <= set(dir(llmsurgeon))
    assert isinstance(import_module("llmsurgeon.model"), ModuleType) and llmsurgeon.model.__path__
