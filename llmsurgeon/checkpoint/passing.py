"""Temporary folders that do not pile up: what a killed process left behind, the next one removes."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "llmsurgeon-passing-"
MARK = ".llmsurgeon"  # locked for as long as the folder is in use


def passing_folder(owner: object) -> Path:
    """A new temporary folder, which goes with `owner`, or with this process."""
    place = Path(tempfile.gettempdir())
    with _alone(place):
        _sweep(place)
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        fd = os.open(folder / MARK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        with suppress(OSError):  # a file system without locks: nothing is swept there
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    weakref.finalize(owner, _remove, folder, fd)
    return folder


def files_in(folder: Path) -> list[Path]:
    """What was put into it."""
    return sorted(path for path in folder.iterdir() if path.name != MARK)


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
    for path in files_in(folder):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (folder / MARK).unlink()
    folder.rmdir()
