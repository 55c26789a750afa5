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
# Of what was measured only the size is kept.
MEASURED = ("evaluation", "refit", "ternary", "distill", "warning")
# Metadata of GGUF files is no part of the facts; the dump has it.
LEFT_OUT = ("gguf",)
# The unit that others are written as differences from.
REFERENCE = "llama"
COMPACT = (",", ":")
GONE = "(gone)"
Facts = dict[str, Any]


def versions() -> dict[str, str]:
    """Major and minor version of each package that the set depends on."""
    return {name: ".".join(version(name).split(".")[:2]) for name in PACKAGES}


def facts_of(made: Made, parent: Mapping[str, Any]) -> Facts:
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
        found |= {f"file {name}": True for name in made.files["files.txt"].splitlines()}
    if "config.json" in made.files:
        config = flat(offered(json.loads(made.files["config.json"])), "config")
        found |= {key: value for key, value in config.items() if key not in parent or parent[key] != value}
        found |= {key: GONE for key in parent if key not in config}
    if "surgery.json" in made.files:
        found |= flat(unmeasured(json.loads(made.files["surgery.json"])), "surgery")
    if "recipe.yaml" in made.files:
        found |= flat(yaml.safe_load(made.files["recipe.yaml"]), "recipe")
    return found


def offered(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with one line of its `auto_map`: each file, and the Auto classes that find a class there."""
    files: dict[str, list[str]] = {}
    for auto, place in sorted(config.get("auto_map", {}).items()):
        files.setdefault(place.partition(".")[0], []).append(auto.removeprefix("AutoModelFor"))
    line = "; ".join(f"{file}: {' '.join(found)}" for file, found in files.items())
    return {**config, **({"auto_map": line} if line else {})}


def unmeasured(surgery: Mapping[str, Any]) -> dict[str, Any]:
    """surgery.json with how many keys what was measured has, and the costs as rows of numbers."""
    costs = {key: list(surgery[key].values()) for key in ("before", "after")}
    surgery = {key: value for key, value in surgery.items() if key != "origin"}  # has a sum of random numbers
    return {**surgery, **costs, **{key: _size(surgery[key]) for key in MEASURED if key in surgery}}


def _size(value: Any) -> Any:
    if isinstance(value, list):
        return [len(value), *([_size(value[0])] if value else [])]
    return len(value) if isinstance(value, dict) else type(value).__name__


def flat(value: Any, path: str) -> Facts:
    """Path -> value of everything inside. Mappings in a list are values, those that are alike one value."""
    if isinstance(value, dict) and value:
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{path}.{key}").items()}
    if isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        places: dict[str, list[int]] = {}
        for place, inner in enumerate(value):
            # Which layers a block was made from stands in surgery.json, too.
            shape = _said({k: v for k, v in inner.items() if k != "parents"}) if isinstance(inner, dict) else inner
            places.setdefault(json.dumps(shape), []).append(place)
        return {f"{path}[{_ranges(found)}]": json.loads(shape) for shape, found in places.items()}
    return {path: value}


def _said(value: Any) -> Any:
    """A value without what mappings in it say no or nothing of."""
    if isinstance(value, dict):
        return {key: _said(inner) for key, inner in value.items() if inner is not None and inner is not False}
    return [_said(inner) for inner in value] if isinstance(value, list) else value


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers as 0-2,5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def of_unit(cases: list[Made]) -> dict[str, Facts]:
    """The facts of a unit's cases, by their names."""
    parent = next(
        (flat(json.loads(made.files["config.json"]), "config") for made in cases if made.name == "parent"), {}
    )
    found = {made.name: facts_of(made, parent) for made in cases if made.name != "parent"}
    # As JSON holds them, in one order of keys.
    return {name: json.loads(json.dumps(own, sort_keys=True)) for name, own in found.items()}


def packed(unit: str, cases: Mapping[str, Facts], reference: Mapping[str, Facts]) -> dict[str, Facts]:
    """Each case as what differs from one that it is most like, which keeps the files small and readable.

    That is an earlier case of the unit, or that of `reference`, REFERENCE's cases, with the same name.
    """
    found: dict[str, Facts] = {}
    for name, own in cases.items():
        near = {other: cases[other] for other in found}
        if unit != REFERENCE and name in reference:
            near[f"{REFERENCE}/{name}"] = reference[name]
        ways: list[Facts] = [own]
        for other, base in near.items():
            changed = {key: value for key, value in own.items() if key not in base or base[key] != value}
            without = "; ".join(key for key in base if key not in own)
            ways.append({"like": other, **changed, **({"without": without} if without else {})})
        found[name] = min(ways, key=lambda way: len(json.dumps(way)))
    return found


def unpacked(stored: Mapping[str, Facts], reference: Mapping[str, Facts]) -> dict[str, Facts]:
    """The facts that `packed` was given."""
    found: dict[str, Facts] = {}
    for name, changed in stored.items():
        like, without = changed.get("like", ""), changed.get("without", "").split("; ")
        base = reference[name] if like == f"{REFERENCE}/{name}" else found[like] if like else {}
        both = {**base, **changed}
        found[name] = {key: both[key] for key in sorted(both) if key not in ("like", "without", *without)}
    return found


def stored_units() -> list[str]:
    """The units that the set holds."""
    return sorted(path.stem for path in EXPECTED.glob("*.json") if path.stem != "versions")


def read(name: str) -> dict[str, Facts]:
    """The facts that a unit's file holds."""
    return unpacked(_held(name), unpacked(_held(REFERENCE), {}))


def _held(name: str) -> dict[str, Facts]:
    return dict(json.loads((EXPECTED / f"{name}.json").read_text()))


def write(renewed: Mapping[str, list[Made]]) -> None:
    """Renew these units' files, and how the others say what differs from REFERENCE."""
    EXPECTED.mkdir(exist_ok=True)
    held = {name: read(name) for name in stored_units()} | {name: of_unit(cases) for name, cases in renewed.items()}
    for name, cases in held.items():
        stored = packed(name, cases, held[REFERENCE]).items()
        lines = [f"{json.dumps(case)}: {json.dumps(own, separators=COMPACT)}" for case, own in stored]
        (EXPECTED / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    (EXPECTED / "versions.json").write_text(json.dumps(versions()) + "\n")
