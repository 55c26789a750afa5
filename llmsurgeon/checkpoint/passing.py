"""Temporary folders that do not pile up: what a killed process left behind, the next one removes."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llmsurgeon.checkpoint.lock import Hold, hold

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
    _sweep(Path(tempfile.gettempdir()))
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        with suppress(FileNotFoundError):  # another process swept it away before it had its mark
            mark = hold(folder / MARK)
            if mark is not None:
                (folder / FILES).mkdir()
                return folder / FILES, weakref.finalize(owner, _remove, folder, mark)


def _remove(folder: Path, mark: Hold) -> None:
    with suppress(OSError):
        _remove_marked(folder, mark)
    mark.release()


def sweep() -> None:
    """Remove what killed processes have left."""
    _sweep(Path(tempfile.gettempdir()))


def _sweep(place: Path) -> None:
    """Remove our folders that nobody holds, and those that a kill left without anything in them."""
    for folder in place.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if folder.is_symlink() or folder.lstat().st_uid != os.geteuid():
                continue
            if not any(folder.iterdir()):
                folder.rmdir()
                continue
            if (folder / MARK).is_symlink() or not (folder / MARK).is_file():
                continue
            mark = hold(folder / MARK)
            if mark is not None:
                _remove_marked(folder, mark)


def _remove_marked(folder: Path, mark: Hold) -> None:
    """The mark goes last: a kill meanwhile leaves what can be swept again."""
    if (folder / FILES).exists():
        shutil.rmtree(folder / FILES)
    mark.end()
    folder.rmdir()
