"""Write down what the command line makes of tiny models of every family, and compare two such dumps.

Tensors depend on machine and versions: make both dumps on one machine, in one environment.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import pkgutil
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.golden.record import Made

ROOT = Path(__file__).resolve().parents[2]


def options() -> argparse.Namespace:
    """What the command line says."""
    from tests.golden.compare import ALL_KINDS

    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    dump = verbs.add_parser("dump", help="write everything down in a new folder")
    dump.add_argument("folder", type=Path)
    write = verbs.add_parser("write", help="renew the committed set, tests/golden/expected")
    for verb in (dump, write):
        verb.add_argument("--families", help="some of them, e.g. llama,bert,gguf,recipes; default: all")
        verb.add_argument("--jobs", type=int, default=1, help="processes side by side (default: 1)")
    compare = verbs.add_parser("compare", help="print each difference between two dumps; exit code 1 if any")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    compare.add_argument("--ignore", action="append", default=[], choices=ALL_KINDS, help="may be repeated")
    return parser.parse_args()


def prepare() -> None:
    """Import what commands import, so that a fork has it, and let sums be the same every time."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import datasets  # noqa: F401 - slow to import, as the others
    import gguf  # noqa: F401
    import torch
    import transformers

    import llmsurgeon

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for found in pkgutil.walk_packages(llmsurgeon.__path__, "llmsurgeon."):
        if not any(part in found.name for part in ("triton", "vllm", "__main__")):
            importlib.import_module(found.name)


def done(task: tuple[str, Path | None]) -> tuple[str, list[Made], float, list[str]]:
    """Run one unit and write it down if there is a folder for it: name, cases, seconds, what went wrong."""
    from tests.golden.parents import units
    from tests.golden.record import recorded

    name, folder = task
    began = time.monotonic()
    cases: list[Made] = []
    wrong: list[str] = []
    try:
        for made in recorded(units()[name]):
            cases.append(made)
            if folder:
                put(made, folder / name / made.name)
            if made.crashed:
                wrong.append(f"{name}/{made.name}: {made.said.strip().splitlines()[-1]}")
    except Exception:
        wrong.append(f"{name}: {traceback.format_exc()}")
    return name, cases, time.monotonic() - began, wrong


def put(made: Made, place: Path) -> None:
    """Write a case into its folder."""
    for file, content in {"said.txt": made.said, **made.files}.items():
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        (place / file).write_text(content)


def record(given: argparse.Namespace) -> int:
    """All units, each in a process of its own, so that none depends on what ran before it."""
    from tests.golden import facts
    from tests.golden.parents import units

    known = [name for name in units() if given.verb == "dump" or name not in facts.LEFT_OUT]
    names = given.families.split(",") if given.families else known
    if unknown := set(names) - set(known):
        sys.exit(f"no such family: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    folder = given.folder.resolve() if given.verb == "dump" else None
    if folder and folder.exists() and any(folder.iterdir()):
        sys.exit(f"{folder} is not empty: give a new folder")
    wrong: list[str] = []
    renewed: dict[str, list[Made]] = {}
    began = time.monotonic()
    with multiprocessing.get_context("fork").Pool(given.jobs, maxtasksperchild=1) as pool:
        for name, cases, seconds, found in pool.imap_unordered(done, [(name, folder) for name in names], chunksize=1):
            print(f"{name:24} {len(cases):5} cases {seconds:7.1f} s", flush=True)
            renewed[name] = cases
            wrong += found
    total = sum(map(len, renewed.values()))
    print(f"{'all':24} {total:5} cases {time.monotonic() - began:7.1f} s")
    for line in wrong:
        print(f"wrong: {line}", file=sys.stderr)
    if not folder and not wrong:
        facts.write(renewed)
    return int(bool(wrong))


def compare(given: argparse.Namespace) -> int:
    """Print what differs between two dumps."""
    from tests.golden.compare import differences

    for folder in (given.before, given.after):
        if not folder.is_dir():
            sys.exit(f"{folder}: no such folder")
    found = 0
    for line in differences(given.before, given.after, frozenset(given.ignore)):
        print(line)
        found += 1
    print(f"{found} differences" if found else "no difference")
    return int(found > 0)


def main() -> int:
    """Do what the command line asks for."""
    given = options()
    if given.verb == "compare":
        return compare(given)
    prepare()
    return record(given)


if __name__ == "__main__":
    sys.exit(main())
