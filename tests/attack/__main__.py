"""Run attacks and print a table: kind, tries, clean, wrong. Exit code 1 if any try went wrong."""

from __future__ import annotations

import argparse
import importlib
import os
import pickle
import pkgutil
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[2]
KINDS = (
    "healthy",
    "files",
    "headers",
    "indexes",
    "configs",
    "tokenizers",
    "gguf",
    "yaml",
    "surgery",
    "texts",
    "arguments",
    "kills",
)


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(prog="scripts/attack", description=__doc__)
    here = [kind for kind in KINDS if Path(__file__).with_name(f"{kind}.py").exists()]
    parser.add_argument("--seed", type=int, default=0, help="tries of one seed are the same every time")
    parser.add_argument("--tries", type=int, default=3000, help="how many in all (default: 3000)")
    parser.add_argument("--seconds", type=float, help="stop after so long, however many were made")
    parser.add_argument("--jobs", type=int, default=1, help="processes that make them side by side")
    parser.add_argument("--kinds", default=",".join(here), help=f"some of {','.join(here)}")
    parser.add_argument("--case", metavar="KIND:NUMBER", help="one try again, with all that it printed")
    parser.add_argument("--keep", type=Path, help="folder for the inputs of tries that went wrong")
    given = parser.parse_args()
    if unknown := set(given.kinds.split(",")) - set(here):
        parser.error(f"no such kind: {', '.join(sorted(unknown))}; there are {', '.join(here)}")
    return given


def prepare(scratch: Path) -> None:
    """Set the environment that every try starts with, and import what commands import, so that a fork is quick."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(scratch / "hub"),
        "LLMSURGEON_CACHE": str(scratch / "cache"),
        "HOME": str(scratch / "home"),
        "TMPDIR": str(scratch / "tmp"),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "NUMBA_CACHE_DIR": str(Path(tempfile.gettempdir()) / "llmsurgeon-attack-numba"),
    }
    for name in ("home", "tmp"):
        (scratch / name).mkdir()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    warnings.simplefilter("ignore")
    import datasets  # noqa: F401 - slow to import, as the others
    import gguf  # noqa: F401
    import torch
    import transformers

    import llmsurgeon

    torch.set_num_threads(1)
    for found in pkgutil.walk_packages(llmsurgeon.__path__, "llmsurgeon."):
        if not any(part in found.name for part in ("triton", "vllm", "__main__")):
            importlib.import_module(found.name)
    for name in (
        "AutoTokenizer",
        "AutoModelForCausalLM",
        "Trainer",
        "LlamaForCausalLM",
        "Qwen3ForCausalLM",
        "BertForMaskedLM",
    ):
        getattr(transformers, name)


def main() -> int:
    """Make the tries that the command line asks for."""
    given = options()
    scratch = Path(tempfile.mkdtemp(prefix="llmsurgeon-attack-"))
    try:
        prepare(scratch)
        return replay(given, scratch) if given.case else attack(given, scratch)
    finally:
        for place, folders, _ in os.walk(scratch):
            for folder in folders:
                Path(place, folder).chmod(0o700)
        shutil.rmtree(scratch, ignore_errors=True)


def replay(given: argparse.Namespace, scratch: Path) -> int:
    """One try, with everything that it printed."""
    from tests.attack.ground import Ground

    kind, number = given.case.split(":")
    verdict = attempt(kind, int(number), given, Ground(_made(scratch / "ground")), scratch)
    print(f"{verdict.what}\nllmsurgeon {' '.join(map(ascii, verdict.arguments))}")
    if verdict.ended:
        print(f"exit code {verdict.ended.code}, signal {verdict.ended.signal}, {verdict.ended.seconds:.2f} s")
        print(f"--- stdout\n{ascii_lines(verdict.ended.out)}\n--- stderr\n{ascii_lines(verdict.ended.err)}")
    print(f"--- wrong: {verdict.wrong}")
    return int(verdict.wrong is not None)


@dataclass
class Tally:
    """What came of some tries; `seen` maps the signature of a wrong to the tries that have it."""

    tries: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    seen: dict[str, list[str]] = field(default_factory=dict)

    def add(self, other: Tally) -> None:
        """Count another one's tries as well."""
        self.tries += other.tries
        for kind, spent in other.seconds.items():
            self.seconds[kind] = self.seconds.get(kind, 0.0) + spent
        for signature, cases in other.seen.items():
            self.seen.setdefault(signature, []).extend(cases)


def attack(given: argparse.Namespace, scratch: Path) -> int:
    """All tries, kinds in turn, in as many processes as asked for; the table."""
    started = time.monotonic()
    workers = []
    for job in range(given.jobs):
        worker = os.fork()
        if not worker:
            code = 1
            try:
                tally = stripe(given, job, scratch)
                (scratch / f"tally-{job}").write_bytes(pickle.dumps(tally))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        workers.append(worker)
    tally = Tally()
    for job, worker in enumerate(workers):
        if os.waitpid(worker, 0)[1]:
            raise RuntimeError("a process of the attack has failed")
        tally.add(pickle.loads((scratch / f"tally-{job}").read_bytes()))
    return table(given, tally, time.monotonic() - started)


def stripe(given: argparse.Namespace, job: int, scratch: Path) -> Tally:
    """Every so-manieth try, beginning with number `job`."""
    from tests.attack.ground import Ground

    kinds, ground, tally = given.kinds.split(","), Ground(_made(scratch / f"ground-{job}")), Tally()
    until = time.monotonic() + given.seconds if given.seconds else None
    for place in range(job, given.tries, given.jobs):
        before = time.monotonic()
        if until and before > until:
            break
        kind, number = kinds[place % len(kinds)], place // len(kinds)
        verdict = attempt(kind, number, given, ground, scratch)
        tally.tries[kind] += 1
        tally.seconds[kind] = tally.seconds.get(kind, 0.0) + time.monotonic() - before
        if verdict.wrong:
            alike = tally.seen.setdefault(verdict.signature, [])
            alike.append(f"{kind}:{number}")
            if len(alike) == 1:
                line = " ".join(ascii(word)[:80] for word in verdict.arguments)
                said = f"{kind}:{number} {verdict.signature}\n    {verdict.what!a}\n    {line}"
                print(said, file=sys.stderr, flush=True)
    return tally


def table(given: argparse.Namespace, tally: Tally, seconds: float) -> int:
    """Print what came of the tries; the exit code."""
    wrong = Counter(case.partition(":")[0] for cases in tally.seen.values() for case in cases)
    for signature, cases in sorted(tally.seen.items(), key=lambda item: -len(item[1])):
        print(f"{len(cases):5}  {signature}  {' '.join(cases[:4])}")
    print(f"\n{'kind':12} {'tries':>6} {'clean':>6} {'wrong':>6} {'seconds':>8}")
    for kind in given.kinds.split(","):
        tries, spent = tally.tries[kind], tally.seconds.get(kind, 0)
        print(f"{kind:12} {tries:6} {tries - wrong[kind]:6} {wrong[kind]:6} {spent:8.0f}")
    total, bad = tally.tries.total(), wrong.total()
    print(f"{'all':12} {total:6} {total - bad:6} {bad:6} {seconds:8.0f}")
    if bad:
        print(f"again: scripts/attack --seed {given.seed} --case {next(iter(tally.seen.values()))[0]}")
    return int(bad > 0)


def attempt(kind: str, number: int, given: argparse.Namespace, ground: object, scratch: Path) -> object:
    """One try of a kind: the same for one seed and number every time."""
    from tests.attack.scene import Scene, Verdict

    folder = _made(scratch / f"{kind}-{number}")
    scene = Scene(folder, ground)
    try:
        draw = Random(f"{given.seed}:{kind}:{number}")
        try:
            verdict = importlib.import_module(f"tests.attack.{kind}").attempt(draw, scene)
        except Exception as error:
            verdict = Verdict("", (), f"the attack itself failed: {error!r}")
        if verdict.wrong and given.keep:
            shutil.copytree(
                folder, given.keep / folder.name, symlinks=True, dirs_exist_ok=True, ignore_dangling_symlinks=True
            )
        return verdict
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def ascii_lines(text: str) -> str:
    """A text that no terminal trips over."""
    return "\n".join(ascii(line)[1:-1] for line in text.splitlines())


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


if __name__ == "__main__":
    sys.exit(main())
