#!/usr/bin/env python3
"""Run what touches models in environments of other versions, and load every form of every family there.

    scripts/versions                    all environments: suite and forms; hours on a small machine
    scripts/versions --forms            the forms alone: minutes
    scripts/versions newest --if-newer --quick      what CI runs beside the pinned versions

lowest      the lower bounds of pyproject.toml (torch's is a build with CUDA, gigabytes of it)
pinned      constraints.txt; writes the checkpoints that the others load
newest      the newest that PyPI gives
4.57, 5.14  these releases of transformers, below the package's bounds: forms only

Environments are made under .venv-versions/ and kept. The tables go to stdout as Markdown; --write puts them into
docs/formats.md between its markers. Exit code 1 where a test fails, or a form is read wrongly without an error.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import time
import tomllib
import venv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from generated_page import write_between

ROOT = Path(__file__).parents[1]
HOME = ROOT / ".venv-versions"
PAGE = ROOT / "docs" / "formats.md"
MARKERS = ("<!-- written by scripts/versions -->", "<!-- end -->")
# Environments of another transformers alone, which load forms.
OLDER = {"4.57": "4.57.3", "5.14": "5.14.0"}
# The newest torch is a build with CUDA, gigabytes of it: this one stays.
TORCH = "torch==2.13.0"
SUITE = ("modeling", "formats", "model", "operations", "healing", "evaluation", "walk", "kernels", "test_leaned_on.py")
QUICK = ("modeling", "model/families", "formats/test_loads_alone.py", "test_leaned_on.py")
SHOWN = ("torch", "transformers", "huggingface_hub", "accelerate", "datasets", "gguf", "numpy", "pydantic")
# A form is read rightly where no logit differs by more.
CLOSE = 5e-5


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def direct() -> list[str]:
    """Requirements of the package and of its tests that PyPI releases and this project leans on."""
    extra = project()["optional-dependencies"]
    tests = [name for name in extra["test"] if name.startswith(("pytest", "hypothesis"))]
    return [*project()["dependencies"], *extra["cpu"], *extra["peft"], *extra["llamacpp"], *tests]


def name_of(requirement: str) -> str:
    return re.split(r"[<>=!~ ]", requirement)[0]


def pins() -> dict[str, str]:
    """constraints.txt: name -> version."""
    lines = (line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    return {name.lower().replace("_", "-"): version for name, version in lines}


def wanted(environment: str) -> list[str]:
    """What pip is asked for."""
    if environment == "lowest":
        # Tools of the tests are no promise: they are as pinned.
        kept = [name for name in direct() if not name.startswith(("pytest", "hypothesis", "xllamacpp"))]
        tools = [f"{name}=={pins()[name]}" for name in map(name_of, direct()) if name.startswith(("pytest", "hypoth"))]
        return [*(name.replace(">=", "==") for name in kept), *tools, "xllamacpp"]
    if environment in OLDER:
        return [TORCH, f"transformers=={OLDER[environment]}", "accelerate"]
    if environment == "pinned":
        return [f"{name}=={pins()[name.lower().replace('_', '-')]}" for name in map(name_of, direct())]
    return [TORCH if name_of(name) == "torch" else name for name in direct()]


def made(environment: str) -> Path:
    """The environment's Python, installed where its requirements have changed."""
    folder = HOME / environment
    python, stamp = folder / "bin" / "python", folder / "installed"
    asked = wanted(environment)
    # Of the newest, what that is changes by the day.
    today = time.strftime("%F") if environment == "newest" else ""
    key = hashlib.sha256(json.dumps([asked, today]).encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == key:
        return python
    print(f"{environment}: installing {', '.join(asked)}", file=sys.stderr, flush=True)
    if not python.exists():
        venv.create(folder, with_pip=True)
    # torch first: resolved along with the others, it may bring another build.
    torch = next(name for name in asked if name_of(name) == "torch")
    for each in ([torch], asked):
        run([python, "-m", "pip", "install", "--quiet", "--upgrade", *each], check=True)
    stamp.write_text(key)
    return python


def newer() -> list[str]:
    """What of the package's own requirements PyPI has newer than constraints.txt, a phrase each; installs nothing."""
    asked = [name for name in project()["dependencies"] if name_of(name) != "torch"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
    report = json.loads(run([*command, "--report", "-", *asked], check=True, capture_output=True, text=True).stdout)
    about = [item["metadata"] for item in report["install"]]
    found = {each["name"].lower().replace("_", "-"): each["version"] for each in about}
    return [f"{name} {version} ({pins().get(name)})" for name, version in found.items() if pins().get(name) != version]


def run(command: list[Any], **how: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], cwd=ROOT, **how)


def surroundings(folder: Path) -> dict[str, str]:
    """Variables of a process that reads checkpoints: nothing of this machine's caches, nothing from a network."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_", "TRANSFORMERS"))}
    cache = {"HF_HOME": str(folder / "hf"), "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    return {**kept, **cache, "OMP_NUM_THREADS": "1"}


def versions_in(python: Path) -> dict[str, str]:
    code = (
        "import json, platform, importlib.metadata as m\n"
        "found = {d.metadata['name'].lower().replace('-', '_'): d.version for d in m.distributions()}\n"
        "print(json.dumps({'python': platform.python_version(), **found}))"
    )
    found: dict[str, str] = json.loads(run([python, "-c", code], check=True, capture_output=True, text=True).stdout)
    return found


def suite(python: Path, parts: Iterable[str]) -> dict[str, Any]:
    """Counts of the tests in this environment, by pytest's last line."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [python, "-m", "pytest", "-q", "-n", "auto", "-p", "no:cacheprovider"]
    done = run([*command, *(f"tests/{part}" for part in parts)], env=environment, stdout=subprocess.PIPE, text=True)
    print(done.stdout, file=sys.stderr, flush=True)
    said = re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout[-300:])
    return {**{word: int(number) for number, word in said}, "rc": done.returncode}


def written(python: Path, base: Path) -> None:
    """Checkpoints of every form, written in this environment."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run([python, "tests/formats/forms.py", base], env=environment, check=True, stderr=subprocess.DEVNULL)


def read(python: Path, base: Path) -> dict[str, dict[str, Any]]:
    """name of the checkpoint -> what this environment finds in it."""
    folder = base / "caches" / hashlib.sha256(str(python).encode()).hexdigest()[:8]
    command = [python, "-I", "tests/formats/reads_alone.py", base]
    done = run(command, env=surroundings(folder), stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{python}: reading failed\n{done.stderr[-2000:]}")
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])["reports"]
    return found


def right(report: dict[str, Any]) -> bool:
    """Loaded, with all of its weights and no others, the same logits, and the same text with a cache and without."""
    loaded = "error" not in report and not report["missing"]
    return loaded and report["difference"] < CLOSE and report["generation"] is not False


KINDS = {
    "native": "native",
    "surgeon": "surgeon",
    "all": "surgeon, every kind of block in one",
    "nas": "nemotron-nas",
    "mlgru": "surgeon with MLGRUs",
    "block": "block transformer",
}


def reading_tables(reports: dict[str, dict[str, dict[str, Any]]], found: dict[str, dict[str, str]]) -> list[str]:
    """A row for each kind of checkpoint, a column for each transformers; below, what is refused and why."""
    # Of two environments with one transformers, as newest and pinned often are, one is enough.
    by_version = {found[name]["transformers"]: name for name in reports}
    columns = [by_version[v] for v in sorted(by_version, key=lambda v: [int(part) for part in v.split(".")])]
    heads = [f"transformers {found[name]['transformers']}" for name in columns]
    lines = [f"| form | {' | '.join(heads)} |", "|---" * (len(columns) + 1) + "|"]
    for kind, title in KINDS.items():
        cells = []
        for column in columns:
            each = [report for name, report in reports[column].items() if name.partition("-")[0] == kind]
            cells.append(f"{sum(map(right, each))} of {len(each)}")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    refused: dict[tuple[str, str], list[str]] = {}
    for column, head in zip(columns, heads, strict=True):
        for name, report in reports[column].items():
            if not right(report):
                said = report.get("error") or f"READ WRONGLY: {report}"
                refused.setdefault((head, said), []).append(name)
    if refused:
        lines += ["", "| refused while loading, by | checkpoints | what it says |", "|---|---|---|"]
        lines += [f"| {head} | {', '.join(names)} | {said} |" for (head, said), names in refused.items()]
    return lines


def suite_table(results: dict[str, dict[str, Any]], found: dict[str, dict[str, str]]) -> list[str]:
    heads, words = ["environment", "Python", *SHOWN, "tests"], ("passed", "failed", "error", "skipped")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, counts in results.items():
        said = ", ".join(f"{counts[word]} {word}" for word in words if counts.get(word))
        row = [name, found[name]["python"], *(found[name].get(each, "") for each in SHOWN), said]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ("lowest", "pinned", "newest", *OLDER)
    parser.add_argument("environments", nargs="*", choices=[*every, []], help="all by default")
    parser.add_argument("--forms", action="store_true", help="load the forms, run no tests")
    parser.add_argument("--suite", action="store_true", help="run the tests, load no forms")
    parser.add_argument("--quick", action="store_true", help=f"of the tests: {', '.join(QUICK)}")
    parser.add_argument("--if-newer", action="store_true", help="stop where PyPI has nothing newer than the pins")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/formats.md")
    arguments = parser.parse_args()
    chosen = arguments.environments or list(every)
    if arguments.if_newer:
        changed = newer()
        if not changed:
            print("PyPI has nothing newer than constraints.txt: the newest versions are the pinned ones.")
            return 0
        print("newer than constraints.txt:", ", ".join(changed), flush=True)
    pythons = {name: made(name) for name in chosen}
    found = {name: versions_in(python) for name, python in pythons.items()}
    failed, tables = False, []
    if not arguments.forms:
        results = {
            name: suite(p, QUICK if arguments.quick else SUITE) for name, p in pythons.items() if name not in OLDER
        }
        failed = any(counts["rc"] for counts in results.values())
        tables.append(suite_table(results, found))
    if not arguments.suite:
        base = HOME / "forms"
        run(["rm", "-rf", base], check=True)
        written(made("pinned"), base)
        reports = {name: read(python, base) for name, python in pythons.items()}
        wrong = [r for each in reports.values() for r in each.values() if "error" not in r and not right(r)]
        failed = failed or bool(wrong)
        tables.append(reading_tables(reports, found))
    text = "\n\n".join("\n".join(lines) for lines in tables)
    print(text)
    if arguments.write:
        write_between(PAGE, MARKERS, text)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
