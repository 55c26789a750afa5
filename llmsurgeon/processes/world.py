"""Which processes there are, which one this is, and how they meet and part."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from llmsurgeon.errors import SurgeryError
from llmsurgeon.progress import set_quiet

# How long a process waits for the others. One that ends is noticed at once; this is for one that hangs.
PATIENCE = timedelta(hours=2)
TOLD = "llmsurgeon/told"  # in the store that all reach, once one of them has said what went wrong
LAST_WORD = 2.0  # seconds that a process which fails gives another one to say it first


class LostProcess(SurgeryError):
    """Another process of this run has ended, or does not answer."""


@dataclass(frozen=True)
class _World:
    """How many processes there are, the number of this one, and the store that all of them reach."""

    count: int = 1
    rank: int = 0
    store: Any = None


_world = _World()


def several() -> bool:
    """True where a launcher started several processes, whether they have met or not."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def count() -> int:
    """How many processes share the work."""
    return _world.count


def rank() -> int:
    """The number of this one."""
    return _world.rank


def first() -> bool:
    """Whether this is the one that writes, prints and holds locks."""
    return _world.rank == 0


def on_this_machine() -> int:
    """How many of them share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if count() > 1 else 1


def join() -> None:
    """Meet the other processes that a launcher started, which do the same. Does nothing where there are none.

    Raises:
        LostProcess: they cannot be met.
    """
    global _world
    if not several() or count() > 1:
        return
    import torch
    import torch.distributed as dist

    with reaching_others():
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=PATIENCE)))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    _world = _World(size, rank, store)
    stop_with_launcher()
    if not first():
        set_quiet(True)


@contextmanager
def alone() -> Iterator[None]:
    """For a while this process shares nothing with the others, each of which has work of its own."""
    global _world
    together, _world = _world, _World()
    try:
        yield
    finally:
        _world = together


@contextmanager
def reaching_others() -> Iterator[None]:
    """What torch raises where another process is gone, as LostProcess."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise LostProcess(
            f"another process of this run has ended, or cannot be reached ({reason}); started again, the same command "
            "goes on from what is finished"
        ) from error


def speaks(error: SurgeryError) -> bool:
    """Whether this process is to say what went wrong: of all that fail alike, or because one did, one does."""
    if count() == 1:
        return True
    cause = not isinstance(error, LostProcess)
    until = time.monotonic() + (0 if first() and cause else LAST_WORD)
    try:
        while not (told := _world.store.check([TOLD])) and time.monotonic() < until:
            time.sleep(0.05)
        if told or not (first() or cause):
            return False
        _world.store.set(TOLD, "")
    except RuntimeError:  # the store is gone with who kept it, the first process or the launcher
        return first()
    return True


def stop_with_launcher(seconds: float = 1.0) -> None:
    """Where a launcher (torchrun, accelerate launch) started this process and is gone, stop as on SIGTERM."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # started by hand, whoever did may leave
        return
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="launcher").start()
