"""Processes that train beside this one: asked to stop when it is, and never outliving it."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any, NoReturn, Self

from llmsurgeon.healing.distill.signals import as_before, on_stop

STOPPED = 143  # exit code of a process that was asked to stop
PR_SET_PDEATHSIG = 1  # linux/prctl.h
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Crew:
    """Processes started by this one; use as a context manager, whose end is theirs.

    The first SIGTERM or Ctrl-C is noted in `asked` and goes on to them as SIGTERM, upon which they save and end; a
    second one does what it always does. Where none is running, the first does so, too.
    """

    def __init__(self) -> None:
        self.running: dict[Any, tuple[Any, Any]] = {}
        self.asked = 0
        self._starting = False
        self._context = multiprocessing.get_context("spawn")
        self._handlers = on_stop(self._noted)

    def __enter__(self) -> Self:
        self._handlers.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for _, process in self.running.values():
                process.kill()  # what they have saved is whole at any moment
                process.join()
        finally:
            self._handlers.__exit__(kind, error, trace)

    def start(self, target: Callable[[Any], None], job: Any) -> None:
        """Start a process that calls `target` (importable by name) with `job`."""
        process = self._context.Process(target=_begin, args=(target, job))
        self._starting = True
        try:
            with held_back():  # the child begins with these signals held back, until it can heed them
                process.start()
            self.running[process.sentinel] = (job, process)
        finally:
            self._starting = False
        if self.asked:
            self._pass_on()

    def wait(self) -> list[tuple[Any, int]]:
        """Wait until some have ended: (job, exit code) of each."""
        ended = []
        for sentinel in wait(list(self.running)) if self.running else ():
            job, process = self.running.pop(sentinel)
            process.join()
            ended.append((job, process.exitcode))
        return ended

    def _noted(self, number: int, before: dict[int, Any]) -> None:
        if not self._starting and not self.running:
            as_before(number, before)
            signal.raise_signal(number)
            return
        self.asked = number
        for each in before:
            as_before(each, before)
        self._pass_on()

    def _pass_on(self) -> None:
        for _, process in self.running.values():
            process.terminate()


@contextmanager
def held_back() -> Iterator[None]:
    """Signals that ask to stop wait, for this thread and for what it starts."""
    # A tracker of shared memory, which multiprocessing starts along, would let them through again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(target: Callable[[Any], None], job: Any) -> None:
    """The beginning of a child: tied to its parent, then open to SIGTERM. Ctrl-C, which a terminal sends to all, is the
    parent's to pass on."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    target(job)


def _leave(number: int, frame: Any) -> NoReturn:
    sys.exit(STOPPED)


def end_with_parent() -> None:
    """From now on this process, which multiprocessing started, ends when its parent does, however that ends."""
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None:
        return
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    threading.Thread(target=_watch, args=(parent.sentinel,), daemon=True, name="parent").start()
    if os.getppid() != parent.pid:  # it was gone before
        os.kill(os.getpid(), signal.SIGKILL)


def _watch(sentinel: Any) -> None:
    """Wait for the pipe that the parent holds open for as long as it lives: on every system."""
    wait([sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
