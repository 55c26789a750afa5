"""llama.cpp in a process of its own, to be timed: users run one server a process, and several are another thing.

Where a process has more OpenMP threads than processors, libgomp lets them wait for each other by sleeping, not by
spinning: two servers in one process took a fifth to two fifths longer for each token than each by itself.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmsurgeon.errors import SurgeryError
from llmsurgeon.evaluation.llama_server import LlamaCpp, Timing, require_xllamacpp
from llmsurgeon.evaluation.worker import Worker
from llmsurgeon.workers.answering import Answer, answer_all

PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])
# Seconds before each run: threads of the one before spin for some milliseconds before they sleep.
PAUSE = 0.03


class Apart(Worker):
    """One GGUF file, loaded in llama.cpp in a process that ends with this object or with this process.

    Use as a context manager, or `close()` it. Arguments and errors are `LlamaCpp`'s.
    """

    def __init__(self, path: Path | str, *, context: int, threads: int | None = None) -> None:
        require_xllamacpp()
        self.path = Path(path)
        paths = os.pathsep.join(filter(None, [PACKAGE_PARENT, os.environ.get("PYTHONPATH")]))
        # -P: what lies in the working folder is no module.
        command = [sys.executable, "-P", "-m", "llmsurgeon.evaluation.apart", str(self.path), str(context)]
        super().__init__([*command, str(threads or 0)], os.environ | {"PYTHONPATH": paths}, f"{self.path}: llama.cpp")
        self.threads: int = self.said["threads"]

    def time(self, ids: Sequence[int], new_tokens: int, *, again: bool = False) -> Timing:
        """As `LlamaCpp.time`."""
        time.sleep(PAUSE)
        found = self.ask([list(ids), new_tokens, again])
        return Timing(found["prefill"], found["decode"])


def serve(path: str, context: str, threads: str) -> None:
    """Answer requests of [ids, new tokens, again] until there are no more."""

    def load() -> tuple[dict[str, Any], Answer]:
        # Open for as long as the process is there: it ends by being killed, or where nobody asks any more.
        engine = LlamaCpp(path, context=int(context), threads=int(threads) or None)

        def answer(request: Any) -> dict[str, Any]:
            ids, new_tokens, again = request
            timing = engine.time(ids, new_tokens, again=again)
            return {"prefill": timing.prefill, "decode": timing.decode}

        return {"threads": engine.threads}, answer

    answer_all(load, SurgeryError)


if __name__ == "__main__":
    serve(*sys.argv[1:])
