"""A page under docs/ that a script generates, or a part of one: write it, or with --check compare it."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path


def write_or_check(path: Path, wanted: str, source: str) -> int:
    """Write the page; with --check print how it differs from what `source` gives and return 1 if it does."""
    if "--check" not in sys.argv[1:]:
        path.write_text(wanted, encoding="utf-8")
        return 0
    found = path.read_text(encoding="utf-8") if path.exists() else ""
    if found == wanted:
        return 0
    name = f"docs/{path.name}"
    sys.stdout.writelines(difflib.unified_diff(found.splitlines(True), wanted.splitlines(True), name, source))
    print(f"{name} is out of date: run scripts/{Path(sys.argv[0]).name}", file=sys.stderr)
    return 1


def write_between(path: Path, markers: tuple[str, str], text: str) -> None:
    """Put a text between two lines of a page, in the place of what stands there."""
    before, _, rest = path.read_text(encoding="utf-8").partition(markers[0])
    _, _, after = rest.partition(markers[1])
    path.write_text(f"{before}{markers[0]}\n\n{text}\n\n{markers[1]}{after}", encoding="utf-8")
