"""What differs between two dumps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml

# What a file tells of; `--ignore` leaves some of it out.
KINDS = {
    "said.txt": "said",
    "config.json": "config",
    "generation_config.json": "generation",
    "surgery.json": "surgery",
    "recipe.yaml": "recipe",
    "suggested.yaml": "recipe",
    "report.json": "report",
    "report.html": "report",
    "README.md": "card",
    "files.txt": "files",
    "tensors.txt": "tensors",
    "hashes.txt": "hashes",
    "code.txt": "code",
}
ALL_KINDS = tuple(dict.fromkeys((*KINDS.values(), "other")))
ABSENT = "(absent)"


def kind_of(file: Path) -> str:
    """What a file of a dump tells of."""
    return KINDS.get(file.name, "other")


def differences(before: Path, after: Path, ignored: frozenset[str] = frozenset()) -> Iterator[str]:
    """A line for each difference: where, key or number of the line, then what it was and what it is."""
    files = {path.relative_to(root) for root in (before, after) for path in root.rglob("*") if path.is_file()}
    for file in sorted(files):
        if kind_of(file) in ignored:
            continue
        if not (before / file).exists() or not (after / file).exists():
            yield f"{file}: only in {before if (before / file).exists() else after}"
            continue
        first, second = ((root / file).read_text() for root in (before, after))
        if first != second:
            yield from (f"{file}: {line}" for line in _in_file(file, first, second))


def _in_file(file: Path, first: str, second: str) -> Iterator[str]:
    if file.suffix in (".json", ".yaml"):
        found = list(changed_keys(yaml.safe_load(first), yaml.safe_load(second)))
        if found:
            yield from found
            return
    if file.name in ("tensors.txt", "hashes.txt", "code.txt", "files.txt"):
        one, two = (set(content.splitlines()) for content in (first, second))
        yield from (f"- {_short(line)}" for line in sorted(one - two))
        yield from (f"+ {_short(line)}" for line in sorted(two - one))
        if one != two:
            return
    pairs = list(zip_longest(first.splitlines(), second.splitlines(), fillvalue=ABSENT))
    wrong = [(number, pair) for number, pair in enumerate(pairs, 1) if pair[0] != pair[1]]
    if not wrong:
        yield "line ends differ"
        return
    number, (was, now) = wrong[0]
    yield f"line {number} of {len(wrong)} that differ: {_short(was)} -> {_short(now)}"


def changed_keys(first: Any, second: Any, path: str = "") -> Iterator[str]:
    """A line for each key whose value differs, and one where the order of keys does."""
    if isinstance(first, dict) and isinstance(second, dict):
        for key in {**first, **second}:
            yield from changed_keys(first.get(key, ABSENT), second.get(key, ABSENT), f"{path}.{key}".lstrip("."))
        if list(first) != list(second) and set(first) == set(second):
            yield f"{path or 'keys'}: in another order"
    elif isinstance(first, list) and isinstance(second, list):
        for place, (one, two) in enumerate(zip_longest(first, second, fillvalue=ABSENT)):
            yield from changed_keys(one, two, f"{path}[{place}]")
    elif json.dumps(first, default=str) != json.dumps(second, default=str):
        yield f"{path}: {_short(json.dumps(first, default=str))} -> {_short(json.dumps(second, default=str))}"


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:197]}..."
