#!/usr/bin/env python3
"""Write the tree of docs/architecture.md from the files' own first sentences; with --check, only say if it is right."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from generated_page import write_or_check

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
MARKERS = ("<!-- written by scripts/gen_architecture_docs.py -->\n", "<!-- end -->\n")
# Folders and names of which one line stands for all.
ALIKE = {"model/families": "<model_type>.py", "modeling": "modeling_surgeon_<model_type>.py"}
APART = {"base.py", "config.py", "modules.py", "vision_language.py"}


def said(path: Path) -> str:
    """The first sentence of a file's docstring, to the first full stop or line."""
    text = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
    return " ".join(text.split()).rstrip(".")


def alike(path: Path, folder: str) -> bool:
    """Whether one line stands for this file and for others."""
    if folder == "model/families":
        return path.name not in APART
    return folder == "modeling" and path.name.startswith("modeling_surgeon_")


def lines(folder: Path, depth: int = 0) -> Iterator[str]:
    """The rows of a folder: its files, then the folders in it."""
    name = folder.relative_to(ROOT / "llmsurgeon").as_posix()
    told = False
    for path in sorted(folder.glob("*.py")):
        if path.name in ("__init__.py", "__main__.py"):
            continue
        if alike(path, name):
            if not told:
                yield f"{'  ' * depth}- `{ALIKE[name]}`, {sum(alike(p, name) for p in folder.glob('*.py'))} of them"
            told = True
            continue
        yield f"{'  ' * depth}- `{path.name}` {said(path)}"
    for inner in sorted(path for path in folder.iterdir() if (path / "__init__.py").exists()):
        yield f"{'  ' * depth}- **`{inner.name}/`** {said(inner / '__init__.py')}"
        yield from lines(inner, depth + 1)


def page() -> str:
    """The whole page with the tree of today."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(MARKERS[0])
    after = rest.split(MARKERS[1])[1]
    return before + MARKERS[0] + "\n".join(lines(ROOT / "llmsurgeon")) + "\n" + MARKERS[1] + after


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, page(), "the files' docstrings"))
