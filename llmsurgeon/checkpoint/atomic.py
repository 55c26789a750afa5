"""Renames that never destroy what they do not mean to, and small files that appear whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

# linux/fs.h and fcntl.h
AT_FDCWD = -100
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
# What says that a kernel or a file system does not know the call.
UNKNOWN = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP}


@cache
def _renameat2() -> Any:
    """The C library's function of that name, None where there is none."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return call


def _rename(source: Path, target: Path, how: int) -> bool:
    """True where it is done, False where the system cannot do it in this way."""
    call = _renameat2()
    if call is None:
        return False
    if call(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), how) == 0:
        return True
    code = ctypes.get_errno()
    if code in UNKNOWN:
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))


def exchange(one: Path, other: Path) -> bool:
    """Swap the names of two files or folders in one step. False, and nothing done, where the system cannot."""
    return _rename(one, other, RENAME_EXCHANGE)


def move(source: Path, target: Path) -> None:
    """Give a file the name `target`, which nothing has.

    Raises:
        FileExistsError: something has it.
    """
    if _rename(source, target, RENAME_NOREPLACE):
        return
    try:
        os.link(source, target, follow_symlinks=False)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: two steps
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        os.rename(source, target)
    else:
        os.unlink(source)


def write_whole(path: Path, content: bytes, *, overwrite: bool = False) -> None:
    """Write a small file under a passing name beside `path` and rename it. A link is replaced, never followed.

    Raises:
        FileExistsError: `path` exists and `overwrite` is off.
    """
    fd, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".partial", dir=path.parent)
    made = Path(name)
    try:
        with os.fdopen(fd, "wb") as file:
            os.fchmod(file.fileno(), 0o666 & ~_umask())  # as any new file
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(made, path) if overwrite else move(made, path)
    except BaseException:
        with suppress(OSError):
            made.unlink()
        raise


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def fsync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
