"""A model in a process of its own, asked by lines of JSON (`llmsurgeon.workers`)."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from signal import Signals
from typing import Any, Self

from llmsurgeon.boundary.foreign import printable
from llmsurgeon.errors import SurgeryError


class Worker:
    """A started process that has its model loaded, and ends with this object or with this process.

    Use as a context manager, or `close()` it. said: what it told when the model was loaded.
    what: names the model and the engine in errors, "MODEL: llama.cpp". quiet: keep what it writes to stderr, and quote
    the end of it where it fails.

    Raises:
        SurgeryError: it ended, or said what is wrong.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str], what: str, quiet: bool = False) -> None:
        self.what = what
        self._log = tempfile.TemporaryFile() if quiet else None  # noqa: SIM115 - closed by close()
        try:
            self._process = subprocess.Popen(
                list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=dict(env)
            )
        except OSError as error:
            if self._log:
                self._log.close()
            raise SurgeryError(f"{command[0]}: cannot be started: {error.strerror or error}") from error
        try:
            self.said = self._heard()
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
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe:
                with suppress(OSError):  # what was not sent is sent to nobody
                    pipe.close()

    def ask(self, request: Any) -> dict[str, Any]:
        """Its answer to one request."""
        assert self._process.stdin
        with suppress(BrokenPipeError):  # what it said last, or that it ended, is heard below
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._heard()

    def _heard(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            # A process that a signal has ended says nothing of it.
            how = f"was ended by {Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise SurgeryError(f"{self.what}'s process {how}; is there memory for it?{self._last_said()}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise SurgeryError(found["error"])
        return found

    def _last_said(self) -> str:
        if not self._log:
            return ""
        self._log.seek(0)
        lines = [line for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return f" It said last: {printable(lines[-1].strip())[:300]}" if lines else ""
