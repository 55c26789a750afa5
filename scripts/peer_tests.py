#!/usr/bin/env python3
"""Run transformers' own tests of a model on converted tiny models, beside those of their parents.

    scripts/peer_tests                     a checkpoint of each form: minutes
    scripts/peer_tests surgeon-llama ...   these, by the names of tests/formats/forms.py
    scripts/peer_tests --write             and put the table into docs/formats.md, between its markers

The tests are those of the installed release: `ModelTesterMixin` of tests/test_modeling_common.py, from its source
distribution on PyPI, which is kept under .venv-engines/peer/. What the parent's class passes and ours does not is
listed with what it says. Exit code 1 where there is any.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ET
from importlib.metadata import version
from pathlib import Path

from generated_page import write_between

ROOT = Path(__file__).parents[1]
HOME = ROOT / ".venv-engines" / "peer"
PAGE = ROOT / "docs" / "formats.md"
MARKERS = ("<!-- written by scripts/peer_tests -->", "<!-- end of peer tests -->")
NAMES = (
    *("surgeon-llama", "all-llama", "surgeon-qwen2", "surgeon-gemma3_text", "surgeon-gpt2", "surgeon-mixtral"),
    *("surgeon-bert", "surgeon-modernbert", "nas-llama", "mlgru-hybrid", "block-llama"),
)
# The source distribution has the common tests without the files that they import; their tests are left out.
EMPTY = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"], check=True)


def peer() -> Path:
    """The folder whose package `transformers_tests` holds the common tests of the installed transformers."""
    release = version("transformers")
    folder = HOME / release
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        pip("download", "--no-deps", "--no-binary", ":all:", f"transformers=={release}", "--dest", str(folder))
        tests = folder / "transformers_tests"
        with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
            for member in archive.getmembers():
                _, _, path = member.name.partition("/tests/")
                if member.isfile() and path.endswith(".py"):
                    (tests / path).parent.mkdir(parents=True, exist_ok=True)
                    content = archive.extractfile(member)
                    assert content is not None
                    (tests / path).write_bytes(content.read())
        for name, mixin in EMPTY.items():
            if not (tests / name).exists():
                (tests / name).parent.mkdir(parents=True, exist_ok=True)
                (tests / name).write_text(f"class {mixin}:\n    pass\n")
        for place in {tests, *(path.parent for path in tests.rglob("*.py"))}:
            (place / "__init__.py").touch()
        pip("install", "--no-deps", "--target", str(folder), "parameterized")
        (folder / "done").touch()
    return folder


def tested(checkpoint: Path, place: Path) -> dict[str, str]:
    """test -> "" where it passed, "skipped", or what it said."""
    report = checkpoint.with_suffix(".xml")
    environment = {
        **os.environ,
        **{"PEER_FOLDER": str(checkpoint), "PYTHONPATH": str(place), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        "HF_MODULES_CACHE": str(checkpoint.with_suffix(".modules")),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", "-c", os.devnull]
    command += ["--rootdir", str(ROOT), f"--junitxml={report}", "tests/peer/common.py"]
    made = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if not report.exists():
        raise SystemExit(f"{checkpoint.name}: the tests did not start\n{made.stdout[-3000:]}{made.stderr[-3000:]}")
    found = {}
    for case in ET.parse(report).iter("testcase"):
        failed = [part for part in case if part.tag in ("failure", "error")]
        said = " ".join((failed[0].get("message") or failed[0].text or "").split()) if failed else ""
        # Without the names of temporary folders, and no longer than a sentence or two.
        found[case.get("name", "")] = re.sub(r"/tmp/[\w./-]+", "FOLDER", said)[:160]
        if not failed and any(part.tag == "skipped" for part in case):
            found[case.get("name", "")] = "skipped"
    return found


def rows(name: str, mine: dict[str, str], theirs: dict[str, str]) -> tuple[str, list[str]]:
    """(a line of the table, a line for each test that the parent's class passes and ours fails, and what it says)."""
    counts = []
    for found in (theirs, mine):
        ran = [said for said in found.values() if said != "skipped"]
        counts.append(f"{ran.count('')} of {len(ran)}")
    lost = [test for test, said in theirs.items() if not said and mine.get(test, "is gone") not in ("", "skipped")]
    line = f"| {name} | {counts[0]} | {counts[1]} | {len(lost)} |"
    alike: dict[tuple[str, str], int] = {}
    for test in lost:
        # test_x_01_fp32 and test_x_02_bf16 are one test with parameters.
        key = (re.split(r"_\d+_", test)[0], mine.get(test, "is gone").replace("|", "/"))
        alike[key] = alike.get(key, 0) + 1
    return line, [
        f"| {name} | `{test}`{f', {count} times' if count > 1 else ''} | {said} |"
        for (test, said), count in alike.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--write", action="store_true", help="put the table into docs/formats.md")
    arguments = parser.parse_args()
    place, table, lost = peer(), [], []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        command = [sys.executable, "tests/formats/forms.py", str(base), *arguments.names]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
        for name in arguments.names:
            line, more = rows(name, tested(base / name, place), tested(base / f"parent-{name}", place))
            print("\n".join([line, *more]), flush=True)
            table, lost = [*table, line], [*lost, *more]
    lines = [f"transformers {version('transformers')}, `ModelTesterMixin`; passed of those that ran.", ""]
    lines += [
        "| checkpoint | the parent's class | ours | passed by the parent's alone |",
        "|---|---|---|---|",
        *table,
        "",
    ]
    lines += ["| checkpoint | test | what it says |", "|---|---|---|", *lost] if lost else []
    if arguments.write:
        write_between(PAGE, MARKERS, "\n".join(lines))
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
