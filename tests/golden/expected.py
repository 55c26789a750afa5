"""The committed golden set: of each case what depends neither on the machine nor on rounding."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from tests.golden.record import Made

EXPECTED = Path(__file__).parent / "expected"
# Choices that scores make, and the defaults that a config is written with, are those of these packages.
PACKAGES = ("torch", "transformers")
# Of what was measured only the keys are kept.
MEASURED = ("evaluation", "refit", "ternary", "distill", "warning")
# Metadata of GGUF files is no part of the facts; the dump has it.
LEFT_OUT = ("gguf",)
GONE = "(gone)"
Facts = dict[str, Any]


def versions() -> dict[str, str]:
    """Major and minor version of each package that the set depends on."""
    return {name: ".".join(version(name).split(".")[:2]) for name in PACKAGES}


def facts(made: Made, parent: Mapping[str, Any]) -> Facts:
    """What is kept of a case: how it ended, its files, resolved recipe and surgery, and what its config changed.

    parent: the parent's config.json, flat.
    """
    found: Facts = {"exit code": made.code}
    if problems := [line for line in made.said.splitlines() if line.startswith("error: ")]:
        # A missed gate says by how much.
        found["error"] = problems if made.code == 2 else len(problems)
    if made.resolved:
        found["said"] = made.said
    if "files.txt" in made.files:
        found["files"] = " ".join(made.files["files.txt"].split())
    if "config.json" in made.files:
        config = flat(json.loads(made.files["config.json"]), "config")
        found |= {key: value for key, value in config.items() if key not in parent or parent[key] != value}
        found |= {key: GONE for key in parent if key not in config}
    if "surgery.json" in made.files:
        found |= flat(unmeasured(json.loads(made.files["surgery.json"])), "surgery")
    if "recipe.yaml" in made.files:
        found |= flat(yaml.safe_load(made.files["recipe.yaml"]), "recipe")
    return found


def unmeasured(surgery: Mapping[str, Any]) -> dict[str, Any]:
    """surgery.json with the keys alone of what was measured."""
    return {key: _keys(value) if key in MEASURED else value for key, value in surgery.items()}


def _keys(value: Any) -> Any:
    if isinstance(value, list):
        return [len(value), *([_keys(value[0])] if value else [])]
    return " ".join(value) if isinstance(value, dict) else type(value).__name__


def flat(value: Any, path: str) -> Facts:
    """Path -> value of everything inside; a list without mappings is one value."""
    if isinstance(value, dict) and value:
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{path}.{key}").items()}
    if isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        return {k: v for place, inner in enumerate(value) for k, v in flat(inner, f"{path}[{place}]").items()}
    return {path: value}


def of_unit(cases: list[Made]) -> dict[str, Facts]:
    """The facts of a unit's cases, by their names."""
    parent = next(
        (flat(json.loads(made.files["config.json"]), "config") for made in cases if made.name == "parent"), {}
    )
    return {made.name: facts(made, parent) for made in cases if made.name != "parent"}


def packed(cases: Mapping[str, Facts]) -> dict[str, Facts]:
    """Each case as what differs from the earlier one that it is most like, which keeps the files small and readable."""
    found: dict[str, Facts] = {}
    for name, own in cases.items():
        ways: list[Facts] = [own]
        for other in found:
            base = cases[other]
            changed = {key: value for key, value in own.items() if key not in base or base[key] != value}
            ways.append({"like": other, **changed, **{key: GONE + GONE for key in base if key not in own}})
        found[name] = min(ways, key=lambda way: len(json.dumps(way)))
    return found


def unpacked(stored: Mapping[str, Facts]) -> dict[str, Facts]:
    """The facts that `packed` was given."""
    found: dict[str, Facts] = {}
    for name, changed in stored.items():
        base = found[changed["like"]] if "like" in changed else {}
        both = {**base, **changed}
        found[name] = {key: value for key, value in both.items() if key != "like" and value != GONE + GONE}
    return found


def write(name: str, cases: list[Made]) -> None:
    """Renew a unit's file."""
    EXPECTED.mkdir(exist_ok=True)
    lines = [f"{json.dumps(case)}: {json.dumps(own)}" for case, own in packed(of_unit(cases)).items()]
    (EXPECTED / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    (EXPECTED / "versions.json").write_text(json.dumps(versions()) + "\n")


def read(name: str) -> dict[str, Facts]:
    """The facts that a unit's file holds."""
    return unpacked(json.loads((EXPECTED / f"{name}.json").read_text()))
