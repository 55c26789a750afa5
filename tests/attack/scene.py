"""One try of an attack: a folder of its own, the command line in a forked process, and what counts as clean.

Clean is an exit code of 0, 2 or 3; at most one error message of ours and no traceback; no death by a signal,
no hang; OUT
there if and only if the command succeeded, and then in order by `verify`; every file that was there before unchanged.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import NoReturn

from tests.attack.ground import Ground

CPU_SECONDS = 60  # of processor time: a busy machine makes no try hang
WALL_SECONDS = 300
MEMORY = 4 << 30  # beside what the driver has mapped already
CLEAN_CODES = (0, 2, 3)
LONGEST_MESSAGE = 20_000
SHORTEST_MESSAGE = 20


@dataclass(frozen=True)
class Ended:
    """How a command ended. `signal`: what killed it, if anything; `code` is None then."""

    code: int | None
    signal: int | None
    hung: bool
    out: str
    err: str
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """What came of a try. `wrong` is None where it was clean."""

    what: str
    arguments: tuple[str, ...]
    wrong: str | None = None
    ended: Ended | None = None

    @property
    def signature(self) -> str:
        """What tries that go wrong in the same way have in common."""
        err = self.ended.err if self.ended else ""
        ours = re.findall(r'File "[^"]*?(llmsurgeon/[^"]+)", line (\d+), in (\S+)', err)
        last = f" at {ours[-1][0]}:{ours[-1][1]} {ours[-1][2]}" if ours and "Traceback" in err else ""
        return f"{self.wrong}{last}"


@dataclass
class Scene:
    """A folder to work in; `ground` is what healthy inputs are copied from."""

    folder: Path
    ground: Ground
    environment: dict[str, str | None] = field(default_factory=dict)
    name: str = "work"
    source: str | None = None  # the folder of a model that was made sick

    @property
    def work(self) -> Path:
        """The working folder of the command."""
        return self.folder / self.name

    def copy(self, name: str, to: str | None = None) -> Path:
        """A fresh copy of something healthy (a file or a folder) in the working folder."""
        source, target = self.ground[name], self.work / (to or name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy2(source, target)
        return target

    def run(
        self,
        arguments: Sequence[str],
        before: Callable[[], None] | None = None,
        cpu_seconds: int = CPU_SECONDS,
        wall_seconds: float = WALL_SECONDS,
    ) -> Ended:
        """Run `llmsurgeon ARGUMENTS` in the working folder. `before` is called in its process just ahead of it."""
        self.work.mkdir(parents=True, exist_ok=True)
        out, err = self.folder / "stdout", self.folder / "stderr"
        started = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if not child:
            self._become(arguments, out, err, before, cpu_seconds)
        code, killed, hung = _wait(child, started + wall_seconds)
        seconds = time.monotonic() - started
        hung = hung or killed == signal.SIGXCPU
        return Ended(code, killed, hung, _text(out), _text(err), seconds)

    def check(self, arguments: Sequence[str], what: str, out: str | None = "OUT") -> Verdict:
        """Run a command over inputs that lie in the working folder, and judge it.

        what: what was done to the inputs, in a few words; out: what the command writes if it succeeds.
        """
        before = _fingerprint(self.work)
        ended = self.run(arguments)
        wrong = judge(ended) or self._left(ended, out) or _changed(before, _fingerprint(self.work))
        return Verdict(what, tuple(arguments), wrong, ended)

    def _left(self, ended: Ended, out: str | None) -> str | None:
        """What is wrong with OUT."""
        place = self.work / out if out else None
        if place is None or not os.path.lexists(place):
            return None
        if ended.code == 2:
            return f"{out} is there, though the command failed"
        if not (place / "config.json").is_file():  # an analysis, or a GGUF file
            return None
        said = self._verified(place)
        if said is None or (self.source and said == self._verified(self.work / self.source)):
            return None  # in order, or as sick as what it was made of: numbers that overflow overflow in a copy, too
        return f"verify of what was written: {said[:300]}"

    def _verified(self, place: Path) -> str | None:
        """What verify says against a model, its folder called MODEL, or None."""
        ended = self.run(["verify", str(place)])
        return None if ended.code == 0 else ended.err.strip().replace(str(place), "MODEL")

    def _become(
        self, arguments: Sequence[str], out: Path, err: Path, before: Callable[[], None] | None, cpu_seconds: int
    ) -> NoReturn:
        """In the forked process: become `llmsurgeon ARGUMENTS`, and end."""
        code = 1
        try:
            os.setpgid(0, 0)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 5))
            resource.setrlimit(resource.RLIMIT_AS, (_mapped() + MEMORY, resource.RLIM_INFINITY))
            for fd, path, flags in ((0, os.devnull, os.O_RDONLY), (1, out, -1), (2, err, -1)):
                opened = os.open(path, flags if flags >= 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                os.dup2(opened, fd)
            sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
            sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
            sys.stderr = os.fdopen(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
            os.chdir(self.work)
            _set(self.environment)
            from llmsurgeon.cli.main import main

            if before:
                before()
            main(list(arguments))
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else (1 if end.code else 0)
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)


def judge(ended: Ended) -> str | None:
    """What is wrong with how a command ended, or None."""
    if ended.hung:
        return f"hang ({ended.seconds:.0f} s)"
    if ended.signal is not None:
        return f"killed by {signal.Signals(ended.signal).name}"
    for sign in ("Traceback (most recent call last)", "Fatal Python error", "Exception ignored in", "panicked at"):
        if sign in ended.err:
            last = [line for line in ended.err.strip().splitlines() if line and not line.startswith(" ")]
            return f"{sign.split(' (')[0]}: {last[-1][:160]}"
    if ended.code not in CLEAN_CODES:
        return f"exit code {ended.code}"
    messages = re.findall(r"^(?:error|Error): (.*)", ended.err, re.MULTILINE)
    if ended.code == 0:
        return f"exit code 0 and an error: {messages[0][:100]}" if messages else None
    if len(messages) != 1:
        return f"exit code {ended.code} with {len(messages)} error messages"
    said = ended.err[ended.err.lower().rindex("error: ") :]
    if len(said) > LONGEST_MESSAGE:
        return f"a message of {len(said)} characters"
    if len(messages[0]) < SHORTEST_MESSAGE and "\n" not in said.strip() and "Usage:" not in ended.err:
        return f"a message that says too little: {messages[0]}"
    if "Usage:" not in ended.err and (
        odd := re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", said)
    ):
        return f"a message with a raw control character ({odd[0]!r})"
    return None


def _wait(child: int, until: float) -> tuple[int | None, int | None, bool]:
    """(exit code, signal, hung) of a child, which is killed after `until`, along with what it started."""
    hung, pause = False, 0.002
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        if time.monotonic() > until and not hung:
            hung = True
            _kill_group(child)
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)
    _kill_group(child)
    if os.WIFSIGNALED(status):
        return None, os.WTERMSIG(status), hung
    return os.WEXITSTATUS(status), None, hung


def _kill_group(child: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)


def _mapped() -> int:
    """Bytes of address space that this process has mapped."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def _set(environment: Mapping[str, str | None]) -> None:
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "replace") if path.exists() else ""


def _fingerprint(folder: Path) -> dict[bytes, str]:
    """Every file below a folder, and what it holds; links by where they lead."""
    found: dict[bytes, str] = {}
    for place, _, files in os.walk(os.fsencode(folder)):
        for name in files:
            path = os.path.join(place, name)
            if os.path.islink(path):
                found[path] = f"-> {os.readlink(path)!r}"
            elif os.path.isfile(path) and os.access(path, os.R_OK):
                with open(path, "rb") as file:
                    found[path] = sha256(file.read()).hexdigest()
            else:
                found[path] = "not read"
    return found


def _changed(before: Mapping[bytes, str], after: Mapping[bytes, str]) -> str | None:
    """What happened to files that were there before."""
    gone: Iterable[bytes] = [path for path in before if path not in after]
    other = [path for path in before if path in after and after[path] != before[path]]
    names = ", ".join(os.path.basename(path).decode("utf-8", "replace") for path in [*gone, *other][:3])
    return f"an input was changed: {names}" if names else None
