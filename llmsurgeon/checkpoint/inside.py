"""Files that are opened only where they lie inside their folder, links followed step by step."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from llmsurgeon.boundary.foreign import first_lines
from llmsurgeon.errors import CheckpointError

MAX_JSON = 64 << 20


class Unsafe(CheckpointError):
    """A file beside the weights that is no regular file of its checkpoint."""


def open_inside(folder: Path, name: str, links: int = 4) -> BinaryIO:
    """Open a regular file of a checkpoint. The folder itself may be reached by links; below it they are not followed,
    but to files of the same folder and to the blobs of the hub cache that the folder is a snapshot in.

    Raises:
        FileNotFoundError: there is none.
        Unsafe: a link that leads elsewhere, a folder, a pipe, a device.
    """
    *above, last = PurePosixPath(name).parts
    handles = [os.open(folder, os.O_RDONLY | os.O_DIRECTORY)]
    try:
        for part in above:
            handles.append(os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=handles[-1]))
        # A pipe without a writer would hold up whoever opens it.
        handle = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=handles[-1])
    except OSError as error:
        if error.errno == errno.ELOOP and links and len(handles) == len(above) + 1:
            return _open_linked(folder, name, os.readlink(last, dir_fd=handles[-1]), links - 1)
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.ENODEV):
            raise Unsafe(f"{folder / name}: not a regular file of this checkpoint") from error
        raise
    finally:
        for opened in handles:
            os.close(opened)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise Unsafe(f"{folder / name}: not a regular file of this checkpoint")
    return os.fdopen(handle, "rb")


def text_inside(folder: Path, name: str) -> str:
    """The text of a regular file of a checkpoint. Errors as in `open_inside`; CheckpointError: not UTF-8."""
    with open_inside(folder, name) as file:
        content = file.read(MAX_JSON)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{folder / name}: not UTF-8 text ({first_lines(error)}); download it again") from error


def _open_linked(folder: Path, name: str, target: str, links: int) -> BinaryIO:
    """Open what a link of the checkpoint points to, where that belongs to it."""
    real = Path(os.path.realpath(folder))
    aimed = Path(os.path.normpath(real / PurePosixPath(name).parent / target))
    blobs = real.parent.parent / "blobs"
    if aimed.is_relative_to(real) and aimed != real:
        return open_inside(real, aimed.relative_to(real).as_posix(), links)
    if real.parent.name == "snapshots" and aimed.parent == blobs:
        return open_inside(blobs, aimed.name, 0)
    raise Unsafe(f"{folder / name}: a link that leads out of this checkpoint")
