"""A file that is being written, followed by a thread that sums it from the page cache and sees it to the disk."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

from llmsurgeon.checkpoint.checksums import Checksum

STEP = 1 << 24
SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h


@cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        call = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return call


def start_writeback(fd: int, at: int, count: int) -> None:
    """Let the disk begin with a range of a file, without waiting. Where that cannot be asked for, fsync does it all."""
    if call := _sync_file_range():
        call(fd, at, count, SYNC_FILE_RANGE_WRITE)


class FollowingSum(threading.Thread):
    """Sums a file while it is being written, reading behind the writer from the page cache, and flushes it to disk.

    `size` is the file's final size, which it must already have; `key` is the caller's.
    """

    def __init__(self, path: Path, size: int, key: str, checksum: Checksum) -> None:
        super().__init__(name=f"sum {path.name}", daemon=True)
        self.path, self.size, self.key, self.checksum = path, size, key, checksum
        self._written = 0
        self._awaited = 0
        self._abandoned = False
        self._changed = threading.Condition()
        self._digest = checksum.begin()
        self._error: Exception | None = None
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        self.start()

    def advance(self, written: int) -> None:
        """The file's first `written` bytes are final."""
        with self._changed:
            self._written = written
            if written >= self._awaited:
                self._changed.notify()

    def abandon(self) -> None:
        """Stop; the file is not going to be finished."""
        with self._changed:
            self._abandoned = True
            self._changed.notify()
        self.join()

    def result(self) -> str:
        """Wait for the end, and the sum."""
        self.join()
        if self._error:
            raise self._error
        return self._digest.hexdigest()

    def run(self) -> None:
        try:
            with self.path.open("rb") as file:
                self._follow(file.fileno())
                if not self._abandoned:
                    os.fsync(file.fileno())
        except Exception as error:  # handed to the thread that asks for the result
            self._error = error

    def _follow(self, fd: int) -> None:
        at = 0
        with self._map, memoryview(self._map) as view:
            while at < self.size:
                end = min(at + STEP, self.size)
                with self._changed:
                    self._awaited = end
                    while self._written < end and not self._abandoned:
                        self._changed.wait()
                    if self._abandoned:
                        return
                start_writeback(fd, at, end - at)
                with view[at:end] as part:
                    self._digest.update(part)
                at = end
