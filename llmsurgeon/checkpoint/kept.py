"""Files kept for a later run: written whole or not at all, with a sum beside them, and believed only where it holds.

Intermediate results and caches are read hours or weeks after they were written, by runs that would not notice that
half of one is gone.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from llmsurgeon.checkpoint.disk import disk_trouble
from llmsurgeon.checkpoint.files import content_sum
from llmsurgeon.checkpoint.lock import hold
from llmsurgeon.errors import CheckpointError, SurgeryError
from llmsurgeon.progress import remark

SUM, LOCK = ".sum", ".lock"
# What torch and safetensors raise when a disk is full names the system's error at most in words.
OS_ERROR = re.compile(r"os error (\d+)")


def keep(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` write a file, note its size and sum beside it, and give it its name.

    Raises:
        SurgeryError: the disk fails or is full; nothing has the name then.
    """
    with writing(path), unfinished(path) as partial:
        write(partial)
        # Before the file has its name: a kill in between leaves a sum of nothing.
        new = partial.with_name(partial.name + SUM)
        new.write_text(json.dumps({"size": partial.stat().st_size, "sha256": content_sum(partial)[0]}))
        new.replace(_note(path))
        partial.replace(path)


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """A file beside `path`, of this process alone, to be renamed to it once it is whole.

    A lock beside it is held for as long as it is written, so that the next one that writes or reads `path` can tell
    what killed processes have left there, and remove it.
    """
    _sweep_beside(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    lock = hold(partial.with_name(partial.name + LOCK))
    try:
        os.close(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666))
        yield partial
    finally:
        _remove_unfinished(partial)
        if lock:
            lock.end()


def _sweep_beside(path: Path) -> None:
    """Remove what killed processes have left of `path`: unfinished files, and locks of such as just got their name."""
    for left in path.parent.glob(f"{escape(path.name)}.*"):
        if re.fullmatch(r"\.\d+", left.name.removeprefix(path.name).removesuffix(LOCK)):
            _sweep(left.with_name(left.name.removesuffix(LOCK)))


def _sweep(left: Path) -> None:
    with suppress(OSError):
        lock = hold(left.with_name(left.name + LOCK))
        if lock:
            _remove_unfinished(left)
            lock.end()


def _remove_unfinished(partial: Path) -> None:
    for rest in (partial, partial.with_name(partial.name + SUM)):
        with suppress(OSError):
            rest.unlink()


def kept(path: Path) -> bool:
    """True where the file is there and is what was written. One that is not is removed, with a line that says so."""
    if not os.path.lexists(path):
        return False
    if whole(path):
        _sweep_beside(path)
        return True
    remark(f"{path}: is damaged (its size or sum is not what was noted when it was written); it is made again")
    forget(path)
    return False


def whole(path: Path) -> bool:
    """True where the file is there and is what was written."""
    try:
        noted = json.loads(_note(path).read_text())
        return bool(path.stat().st_size == noted["size"] and content_sum(path)[0] == noted["sha256"])
    except (OSError, ValueError, KeyError, TypeError, CheckpointError):
        return False


def forget(path: Path) -> None:
    """Remove a kept file."""
    for file in (path, _note(path)):
        with suppress(FileNotFoundError):
            file.unlink()


def _note(path: Path) -> Path:
    return path.with_name(path.name + SUM)


def cache_folder(room: str) -> Path:
    """The folder of this name in LLMSURGEON_CACHE, XDG_CACHE_HOME/llmsurgeon or ~/.cache/llmsurgeon.

    Raises:
        SurgeryError: nothing says where caches are to be.
    """
    own, shared = os.environ.get("LLMSURGEON_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own) / room
    try:
        return Path(shared or Path.home() / ".cache") / "llmsurgeon" / room
    except RuntimeError as error:  # neither HOME nor an entry of this user among the accounts
        raise SurgeryError(f"no folder for caches: {error}; set LLMSURGEON_CACHE to one") from error


@contextmanager
def writing(path: Path, then: str = "free some space and start the same command again") -> Iterator[None]:
    """Turn what goes wrong while something is written to `path` into one error that says what and where.

    Raises:
        SurgeryError: the disk is full, not to be written to, or fails.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise SurgeryError(f"{path}: cannot be written: {_trouble(error)}; {then}") from error
    except RuntimeError as error:
        # torch.save: its writer counts the bytes that the disk took.
        if "unexpected pos" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        raise SurgeryError(f"{path}: cannot be written: the disk took less than all of it; {then}") from error


def _trouble(error: Exception) -> str:
    if isinstance(error, OSError):
        return disk_trouble(error)
    number = OS_ERROR.search(str(error))
    return disk_trouble(OSError(int(number[1]), os.strerror(int(number[1])))) if number else str(error)


def allocate(fd: int, size: int) -> None:
    """Give a file all the room that it will need, so that a full disk is an error now and no signal later.

    Writing to a page of a memory map that finds no room ends the process (SIGBUS). Where the file system has no call
    for it, zeros are written.

    Raises:
        OSError: there is no room.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    zeros = memoryview(bytes(1 << 20))
    at = 0
    while at < size:
        at += os.pwrite(fd, zeros[: size - at], at)
