"""Processes with a head start: forked from one that has imported torch, transformers and all of llmsurgeon.

Starting Python and importing those takes five seconds of a core. A test of what a process does, rather than of how it
starts, takes its processes from here: they end as Python ends (exit codes, tracebacks, what is registered for the end),
and can be signalled and killed. What libraries read from the environment when they are imported stays as it was for
the process that they are forked from.
"""

from __future__ import annotations

import atexit
import importlib
import json
import multiprocessing.process
import os
import pkgutil
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO

TESTS = Path(__file__).parent
# `python -m llmsurgeon`, and what runs here.
LLMSURGEON = "from llmsurgeon.__main__ import main; main()"
SERVER = "import sys, warm; exec(compile(warm.serve(int(sys.argv.pop(1))), '<string>', 'exec'))"
LONGEST = 1 << 20
NUMBER = struct.Struct("i")
# What needs an engine that is not here, and what runs out of checkpoints alone.
NOT_HERE = ("triton", "vllm", "modeling", "__main__")


class Process:
    """What is used of subprocess.Popen; what it prints goes into files, so that nobody has to read meanwhile."""

    def __init__(self, given: Mapping[str, object], stdin: str = "") -> None:
        self._stdout, self._stderr = _printed(), _printed()
        self._status, status = os.pipe()
        with _printed() as typed:
            typed.write(stdin)
            typed.seek(0)
            fds = [typed.fileno(), self._stdout.fileno(), self._stderr.fileno(), status]
            socket.send_fds(_server(), [json.dumps(given).encode()], fds)
        os.close(status)
        self.pid = self._number()
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative after a signal; None while it runs."""
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self._ended()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once there is one."""
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise TimeoutError(f"process {self.pid} still runs after {timeout} s")
            self._ended()
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All that it printed, once it has ended: (stdout, stderr)."""
        self.wait(timeout)
        return _read(self._stdout), _read(self._stderr)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _number(self) -> int:
        return int(NUMBER.unpack(os.read(self._status, NUMBER.size))[0])

    def _ended(self) -> None:
        self.returncode = os.waitstatus_to_exitcode(self._number())
        os.close(self._status)


def start(
    script: str,
    *arguments: object,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    stdin: str = "",
    new_session: bool = False,
) -> Process:
    """As Popen([sys.executable, "-c", script, *arguments]) with `env` (this process's, unless given) and stdin."""
    given = {
        "script": script,
        "arguments": [str(argument) for argument in arguments],
        "environment": dict(os.environ if env is None else env),
        "folder": str(Path.cwd() if cwd is None else cwd),
        "session": new_session,
    }
    return Process(given, stdin)


def _printed() -> IO[str]:
    return tempfile.TemporaryFile("w+", encoding="utf-8")


def _read(file: IO[str]) -> str:
    with file:
        file.seek(0)
        return file.read()


@cache
def _server() -> socket.socket:
    """The connection to the process that others are forked from; it ends with this one."""
    mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its:
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(its.fileno())],
            env={**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS))), "OMP_NUM_THREADS": "1"},
            pass_fds=[its.fileno()],
            stdin=subprocess.DEVNULL,
        )

    def end() -> None:
        mine.close()
        server.wait()

    atexit.register(end)
    return mine


# In the process that others are forked from


def serve(connection: int) -> str:
    """Fork a process for each request; in each of those, the script that it is to run."""
    sys.path.remove("")
    _import_all()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody here waits for the keepers
    with socket.socket(fileno=connection) as asked:
        while True:
            message, fds, _, _ = socket.recv_fds(asked, LONGEST, 4)
            if not message:
                os._exit(0)
            if _fork() == 0:
                break
            for fd in fds:
                os.close(fd)
    status = fds.pop()
    _keep(status)
    return _become(json.loads(message), fds, status)


def _import_all() -> None:
    """What commands import, most of it in the middle of their work."""
    import accelerate
    import datasets  # noqa: F401
    import torch
    import transformers

    import llmsurgeon

    torch.set_num_threads(1)
    for found in pkgutil.walk_packages(llmsurgeon.__path__, "llmsurgeon."):
        if not any(part in found.name for part in NOT_HERE):
            importlib.import_module(found.name)
    assert accelerate.Accelerator and transformers.Trainer
    assert transformers.LlamaForCausalLM and transformers.PreTrainedTokenizerFast


def _fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside threads, which idle
        return os.fork()


def _keep(status: int) -> None:
    """Fork once more; return in the new process, and wait for it in this one, to tell how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = _fork()
    if child == 0:
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.write(status, NUMBER.pack(os.waitpid(child, 0)[1]))
    os._exit(0)


def _become(given: dict[str, object], fds: Sequence[int], status: int) -> str:
    """Take on folder, environment, streams and arguments, and tell who this is."""
    import torch

    if given["session"]:
        os.setsid()
    os.write(status, NUMBER.pack(os.getpid()))
    os.close(status)
    for place, fd in enumerate(fds):
        os.dup2(fd, place)
        os.close(fd)
    sys.stdin = os.fdopen(0, "r", encoding="utf-8", closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", encoding="utf-8", closefd=False)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)  # type: ignore[misc]
    os.environ.clear()
    os.environ.update(given["environment"])  # type: ignore[arg-type]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    os.chdir(given["folder"])  # type: ignore[arg-type]
    multiprocessing.process.ORIGINAL_DIR = os.getcwd()  # where processes that it spawns begin
    sys.argv[1:] = given["arguments"]  # type: ignore[assignment, arg-type]
    return str(given["script"])
