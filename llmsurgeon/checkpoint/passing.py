"""Temporary folders that do not pile up: what a killed process left behind, the next one removes."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path

PREFIX = "llmsurgeon-"
MARK = ".llmsurgeon-temporary"  # locked for as long as the folder is in use


def passing_folder(owner: object) -> Path:
    """A new temporary folder, which goes with `owner`, or with this process."""
    _sweep(Path(tempfile.gettempdir()))
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    # Locked before it has its name, by which others know a folder that may be swept away.
    unnamed = folder / f"{MARK}.new"
    fd = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    with suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unnamed.rename(folder / MARK)
    weakref.finalize(owner, _remove, folder, fd)
    return folder


def files_in(folder: Path) -> list[Path]:
    """What was put into it."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith(MARK))


def _remove(folder: Path, fd: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(fd)


def _sweep(place: Path) -> None:
    """Remove our folders that nobody holds."""
    for folder in place.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if folder.is_symlink() or folder.lstat().st_uid != os.geteuid():
                continue
            fd = os.open(folder / MARK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(fd)
