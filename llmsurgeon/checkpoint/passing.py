"""Temporary folders that do not pile up: what a killed process left behind, the next one removes."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "llmsurgeon-passing-"
MARK, FILES = "in-use", "files"  # the first is locked for as long as it is true


class _Owner:
    """Something to keep alive."""


@contextmanager
def passing() -> Iterator[Path]:
    """A new temporary folder for a while."""
    folder, end = _made(owner := _Owner())
    try:
        yield folder
    finally:
        end()
        del owner


def passing_folder(owner: object) -> Path:
    """A new, empty temporary folder, which goes with `owner`, or with this process."""
    return _made(owner)[0]


def _made(owner: object) -> tuple[Path, Callable[[], object]]:
    place = Path(tempfile.gettempdir())
    with _alone(place):
        _sweep(place)
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        fd = os.open(folder / MARK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        with suppress(OSError):  # a file system without locks: nothing is swept there
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    (folder / FILES).mkdir()
    return folder / FILES, weakref.finalize(owner, _remove, folder, fd)


def _remove(folder: Path, fd: int) -> None:
    with suppress(OSError):
        _remove_marked(folder)
    os.close(fd)


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Of processes like this one, only one makes or removes folders here at a time."""
    fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def sweep() -> None:
    """Remove what killed processes have left."""
    place = Path(tempfile.gettempdir())
    with suppress(OSError), _alone(place):
        _sweep(place)


def _sweep(place: Path) -> None:
    """Remove our folders that nobody holds, and those that a kill left without anything in them."""
    for folder in place.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if folder.is_symlink() or folder.lstat().st_uid != os.geteuid():
                continue
            if not any(folder.iterdir()):
                folder.rmdir()
                continue
            fd = os.open(folder / MARK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove_marked(folder)
            finally:
                os.close(fd)


def _remove_marked(folder: Path) -> None:
    """The mark goes last: a kill meanwhile leaves what can be swept again."""
    if (folder / FILES).exists():
        shutil.rmtree(folder / FILES)
    (folder / MARK).unlink()
    folder.rmdir()
