"""llama.cpp in a process of its own, to be timed: users run one server a process, and several are another thing.

Where a process has more OpenMP threads than processors, libgomp lets them wait for each other by sleeping, not by
spinning: two servers in one process took a fifth to two fifths longer for each token than each by itself.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from llmsurgeon.errors import SurgeryError
from llmsurgeon.evaluation.llama_server import LlamaCpp, Timing, require_xllamacpp

PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])
# Seconds before each run: threads of the one before spin for some milliseconds before they sleep.
PAUSE = 0.03


class Apart:
    """One GGUF file, loaded in llama.cpp in a process that ends with this object or with this process.

    Use as a context manager, or `close()` it. Arguments and errors are `LlamaCpp`'s.
    """

    def __init__(self, path: Path | str, *, context: int, threads: int | None = None) -> None:
        require_xllamacpp()
        self.path = Path(path)
        paths = os.pathsep.join(filter(None, [PACKAGE_PARENT, os.environ.get("PYTHONPATH")]))
        # -P: what lies in the working folder is no module.
        command = [sys.executable, "-P", "-m", "llmsurgeon.evaluation.apart", str(self.path), str(context)]
        self._process = subprocess.Popen(
            [*command, str(threads or 0)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": paths},
        )
        try:
            self.threads: int = self._heard()["threads"]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with suppress(OSError):  # what was not sent is sent to nobody
                    pipe.close()

    def time(self, ids: Sequence[int], new_tokens: int, *, again: bool = False) -> Timing:
        """As `LlamaCpp.time`."""
        time.sleep(PAUSE)
        assert self._process.stdin
        with suppress(BrokenPipeError):  # what it said last, or that it ended, is heard below
            self._process.stdin.write(json.dumps([list(ids), new_tokens, again]) + "\n")
            self._process.stdin.flush()
        found = self._heard()
        return Timing(found["prefill"], found["decode"])

    def _heard(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise SurgeryError(f"{self.path}: llama.cpp's process ended with exit code {code}; is there memory for it?")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise SurgeryError(found["error"])
        return found


def serve(path: str, context: str, threads: str) -> None:
    """Answer one request a line, [ids, new tokens, again], until there are no more."""
    # Ctrl-C, which a terminal sends to all, is the parent's; it ends this by closing the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer

    def answer(found: dict[str, Any]) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    try:
        with LlamaCpp(path, context=int(context), threads=int(threads) or None) as engine:
            answer({"threads": engine.threads})
            for line in sys.stdin:
                ids, new_tokens, again = json.loads(line)
                timing = engine.time(ids, new_tokens, again=again)
                answer({"prefill": timing.prefill, "decode": timing.decode})
    except SurgeryError as error:
        answer({"error": str(error)})


if __name__ == "__main__":
    serve(*sys.argv[1:])
