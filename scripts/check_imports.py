#!/usr/bin/env python3
"""Check which parts of the package import which: the arrows of docs/architecture, lazy imports included.

Prints each violation as file:line and exits with 1 if there is one.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "llmsurgeon"

# Room or verb -> the rooms it may import. A dotted name allows just that module. Every room may import itself.
GROUND = {"boundary", "errors", "progress"}
FILES = GROUND | {"model", "checkpoint"}
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "boundary": {"errors"},
    "progress": {"boundary"},
    # What a model is: blocks, families, costs. Names no file.
    "model": {"errors"},
    "checkpoint": GROUND,
    # Copied into checkpoints: imports nothing of ours.
    "modeling": set(),
    # A loaded model with packed weights; the kernel is there where numba is.
    "kernels": {"model.ternary"},
    # Called by vLLM; names the config class by path.
    "plugins": set(),
    "formats": FILES,
    "vocabulary": FILES | {"formats"},
    "walk": FILES | {"formats"},
    "text": FILES | {"formats"},
    # Operations name weight edits (checkpoint.transform) and know no files but those that a step names.
    "operations": {"errors", "boundary", "model", "checkpoint.transform", "text.files"},
    "recipe": GROUND | {"operations", "text.files", "formats.names"},
    "evaluation": FILES | {"formats", "vocabulary", "walk", "text", "recipe"},
    "analysis": FILES | {"formats", "walk", "text", "evaluation", "operations"},
    "report": FILES | {"formats", "evaluation"},
    "healing": FILES | {"formats", "walk", "text", "evaluation", "operations", "report"},
    "planning": FILES
    | {"formats", "vocabulary", "walk", "text", "operations", "recipe"}
    | {"analysis", "evaluation", "healing", "report"},
}
ROOMS = FILES | {"formats", "vocabulary", "walk", "text", "operations", "recipe", "planning"}
STORY = ROOMS | {"analysis", "healing", "evaluation", "report"}
# The verbs: each tells its story by calling rooms; the command line calls verbs.
VERBS = {"analyze", "run", "heal", "evaluate", "bench", "export", "inspect", "verify"}
ARROWS |= {
    **dict.fromkeys(VERBS, STORY),
    "heal": STORY | {"run"},
    "bench": STORY | {"export"},
    "cli": STORY | VERBS,
    "__main__": {"cli"},
    # Lazily: `from llmsurgeon import run` is the verb.
    "__init__": VERBS,
}

# Other people's packages that a part must not know at all.
FORBIDDEN = {"operations": {"typer", "transformers"}, "model": {"typer", "transformers"}}

# What cli/ may import while it is being imported; anything else would slow `llmsurgeon --help`.
QUICK = set(sys.stdlib_module_names) | {
    "typer",
    f"{PACKAGE}.cli",
    f"{PACKAGE}.boundary",
    f"{PACKAGE}.errors",
    f"{PACKAGE}.formats.names",
    f"{PACKAGE}.progress",
}


@dataclass(frozen=True)
class Import:
    """One imported module, by its full dotted name; `lazy` where it is not imported along with the file."""

    module: str
    line: int
    lazy: bool


def imports(tree: ast.AST, package: str, lazy: bool = False) -> Iterator[Import]:
    """Every import in a file of `package`, in order; relative ones resolved."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            # `from llmsurgeon import run` names a module by its last word.
            names = [f"{base}.{alias.name}" for alias in node.names] if base == PACKAGE else [base]
            yield from (Import(name, node.lineno, lazy) for name in names)
        else:
            deferred = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _type_checking(node)
            yield from imports(node, package, lazy or deferred)


def _type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def violations(root: Path) -> Iterator[str]:
    """`file:line: what is wrong` for every import under `root`/llmsurgeon that breaks an arrow."""
    for path in sorted((root / PACKAGE).rglob("*.py")):
        relative = path.relative_to(root)
        part = relative.parts[1].removesuffix(".py")
        if part not in ARROWS:
            yield f"{relative}:1: {part} has no entry in ARROWS of scripts/check_imports.py"
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        for found in imports(tree, ".".join(relative.parts[:-1])):
            if problem := _problem(part, found):
                yield f"{relative}:{found.line}: {problem}"


def _problem(part: str, found: Import) -> str | None:
    top, _, inside = found.module.partition(".")
    if top == PACKAGE and inside and inside != "__version__":
        target = inside.split(".")[0]
        allowed = target == part or any(f"{inside}.".startswith(f"{name}.") for name in ARROWS[part])
        if not allowed:
            return f"{part} must not import {found.module} (allowed: {', '.join(sorted(ARROWS[part])) or 'nothing'})"
    elif top in FORBIDDEN.get(part, ()):
        return f"{part} must not know {top}"
    if part == "cli" and not found.lazy and inside != "__version__":
        quick = top in QUICK or any(f"{found.module}.".startswith(f"{name}.") for name in QUICK)
        if not quick:
            return f"cli imports {found.module} at the top of a file; import it inside the function that needs it"
    return None


def main() -> int:
    """Check the repository this script is in."""
    found = list(violations(Path(__file__).resolve().parent.parent))
    print("\n".join(found) if found else "import arrows hold")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
