"""What goes wrong on a disk, said in words that lead on."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmsurgeon.errors import SurgeryError

GOES_ON = "What is finished stays in the .partial folder; the same command started again goes on from there"
ELSEWHERE = "Choose another output folder"
NOTHING = "Nothing was written"


def disk_trouble(error: OSError) -> str:
    """What went wrong while writing, in words."""
    return {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: "the file would exceed the size that the system allows",
        errno.EACCES: "no permission to write",
        errno.EPERM: "not permitted to write",
        errno.EROFS: "the file system is read-only",
        errno.EEXIST: "it has appeared meanwhile",
        errno.ENOTEMPTY: "it has appeared meanwhile",
        errno.EBUSY: "it is a mount point, or in use",
    }.get(error.errno or 0, error.strerror or str(error))


@contextmanager
def explained(path: Path, needed: int = 0, then: str = GOES_ON) -> Iterator[None]:
    """Turn errors of the disk into a SurgeryError that says what to do."""
    try:
        yield
    except OSError as error:
        need = f" ({needed:,} bytes needed)" if needed else ""
        raise SurgeryError(f"{error.filename or path}: {disk_trouble(error)}{need}. {then}") from error
