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

# Part -> the parts it may import. A dotted name allows just that module. Every part may import itself.
BASE = {"boundary", "caches", "errors", "finite", "layers", "limits", "places", "progress", "ternary", "text_file"}
RUN_HELPERS = {"memory", "summary", "scores", "card", "proof"}
STAGES = {"patient", "planning", "texts"}
TOOLS = BASE | {"families", "checkpoint", "spec"}
ARROWS: dict[str, set[str]] = {
    "caches": set(),
    "errors": set(),
    "boundary": {"errors"},
    "limits": set(),
    "layers": {"errors"},
    "places": set(),
    "progress": {"boundary"},
    "text_file": {"boundary", "errors", "progress", "checkpoint.files"},
    "finite": {"errors"},
    "ternary": {"errors"},
    # A loaded model with packed weights; the kernel is there where numba is.
    "packed": {"ternary", "packed_numba"},
    "packed_numba": set(),
    "spec": {"errors"},
    "modeling": set(),
    "checkpoint": {"boundary", "errors", "finite", "limits", "progress"},
    "families": {"errors", "spec"},
    # Operations name weight edits (checkpoint.transform) and know no files.
    "operations": BASE | {"families", "spec", "checkpoint.transform"},
    "recipe_files": {"boundary", "errors"},
    "recipe": BASE | {"operations", "recipe_files"},
    # Scores are taken from the model that a format would build, with the divergence that evaluation reports.
    "analysis": TOOLS | {"formats.models", "formats.experts", "evaluation.agreement", "evaluation.perplexity"},
    # Refitting and what the parent says come from layer-major walks; distillation reads and samples text as calibration
    # does, is judged as evaluation judges, shows its curves as reports do, and takes its step's settings as they are.
    "healing": TOOLS
    | {"analysis.walk", "analysis.calibration", "analysis.self_text", "analysis.charts"}
    | {"formats.models", "evaluation.encoders", "evaluation.evaluate", "operations.distill"},
    "formats": TOOLS,
    "evaluation": TOOLS,
    # A checkpoint with fewer rows, whose tables are those that the model of a smaller config has smaller.
    "vocabulary": TOOLS | {"formats.models", "formats.reading", "formats.towers"},
    # run's own helpers, each a file beside it.
    "memory": BASE,
    "summary": TOOLS,
    "scores": TOOLS | {"analysis", "operations"},
    "card": TOOLS | {"formats", "summary"},
    "proof": TOOLS | {"analysis.walk", "evaluation", "recipe"},
    # A checkpoint opened, what a recipe makes of it, and the text it is healed and judged on.
    "patient": TOOLS | {"formats", "operations", "summary"},
    "planning": TOOLS | {"formats", "operations", "patient", "proof", "recipe", "summary"},
    "texts": TOOLS
    | {"analysis", "evaluation.bits_per_byte", "formats", "healing.data", "operations", "patient", "planning", "proof"}
    | {"recipe", "vocabulary"},
    # What a result depends on, by name.
    "inputs": TOOLS | {"analysis.calibration", "recipe", "texts"},
    "run": TOOLS
    | RUN_HELPERS
    | STAGES
    | {"analysis", "healing", "formats", "evaluation", "recipe", "operations", "inputs"},
    "story": {"boundary", "checkpoint.companions", "errors", "progress", "summary"},
    # The same model in another form: opened and checked as run does it.
    "export": TOOLS
    | {"card", "formats", "inputs", "operations", "patient", "planning", "recipe", "summary", "story", "texts"},
    # A written student and its parent: opened, healed and written as run does it.
    "heal": TOOLS
    | STAGES
    | {"formats", "healing", "inputs", "operations", "proof", "recipe", "run", "summary"}
    | {"story", "vocabulary"},
    # Called by vLLM; names the config class by path.
    "vllm_plugin": set(),
    "cli": TOOLS
    | RUN_HELPERS
    | STAGES
    | {"analysis", "healing", "formats", "evaluation", "recipe", "recipe_files", "operations", "run", "export", "heal"}
    | {"inputs", "vocabulary"},
    "__main__": {"cli"},
    "__init__": set(),
}

# Other people's packages that a part must not know at all.
FORBIDDEN = {"operations": {"typer", "transformers"}, "families": {"typer", "transformers"}}

# What cli/ may import while it is being imported; anything else would slow `llmsurgeon --help`.
QUICK = set(sys.stdlib_module_names) | {
    "typer",
    f"{PACKAGE}.cli",
    f"{PACKAGE}.boundary",
    f"{PACKAGE}.errors",
    f"{PACKAGE}.limits",
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
