"""Locks between processes: a file that one of them holds, and that is free as soon as that process has ended."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

# What file systems say that have no locks, as some networks' have none.
NO_LOCKS = (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class Hold:
    """A lock file that this process holds; processes that it forks do not."""

    def __init__(self, path: Path, lock: FileLock) -> None:
        self._path, self._lock, self._process = path, lock, os.getpid()

    def release(self) -> None:
        """Let go of it; the file stays."""
        self._lock.release()

    def end(self) -> None:
        """Remove the file and let go of it."""
        if self._process != os.getpid():
            return
        if os.name == "nt":  # a file that is open is not removed there, nor is one that somebody else holds by then
            self._lock.release()
        with suppress(OSError):
            self._path.unlink()
        self._lock.release()


def hold(path: Path) -> Hold | None:
    """Hold the lock file `path`, which is made if it is not there; None where another process holds it.

    On a file system that has no locks, everybody holds it.

    Raises:
        OSError: the file cannot be made or opened; FileNotFoundError where its folder is gone.
    """
    if not path.parent.is_dir():  # filelock would make it
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
    # One object for all threads: the thread that lets go may be another one.
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    except NotImplementedError:  # filelock's word for a system call that is not there
        pass
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return Hold(path, lock)
