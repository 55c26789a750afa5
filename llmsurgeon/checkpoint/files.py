"""Files that others wrote: regular ones alone are opened, and what is read is held against the disk at the end."""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import file_digest, sha256
from io import BufferedReader
from pathlib import Path

from llmsurgeon.boundary.foreign import read_json, shortened
from llmsurgeon.boundary.limits import LARGEST_SIZE
from llmsurgeon.errors import CheckpointError

# Parts of a large file that stand for its content: so many, of so many bytes.
SAMPLES, SAMPLE_BYTES = 16, 4096
# The first bytes of what may be the number of a token, too large for one.
HUGE_NUMBER = re.compile(rb":\s*\d{8}")
# Age from which a file's stamp tells of every change.
SETTLED_NS = 2 * 10**9


@dataclass(frozen=True)
class Stamp:
    """Which file is behind a path, and when it last changed, as the file system says."""

    path: Path
    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, path: Path, fd: int | None = None) -> Stamp:
        """Of the file behind `path`, links followed, or of the open file `fd` that was found there."""
        found = os.stat(path) if fd is None else os.fstat(fd)
        return cls(path, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    def check(self) -> None:
        """Raise CheckpointError where the path leads to another file now, or to a changed one."""
        try:
            now = Stamp.of(self.path)
        except OSError as error:
            raise changed(self.path, error.strerror or str(error)) from error
        if now == self:
            return
        if (now.device, now.inode) != (self.device, self.inode):
            raise changed(self.path, "another file has its name now")
        if now.size != self.size:
            raise changed(self.path, f"it had {self.size:,} bytes and has {now.size:,}")
        raise changed(self.path, "it was written to, or its attributes were")


def changed(path: Path, how: str) -> CheckpointError:
    """The error for a file that did not stay as it was."""
    return CheckpointError(
        f"{path}: the file changed while it was being read ({how}); start again once nothing writes there"
    )


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """A regular file, open for reading. A pipe or a device, which would be waited for without end, is refused.

    Raises:
        CheckpointError: not a regular file.
        OSError: as `open`.
    """
    # Opened without waiting: a pipe would not open before somebody writes to it.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        kind = kind_of(os.fstat(fd).st_mode)
        if kind != "a file":
            raise CheckpointError(f"{path}: is {kind}, expected a regular file")
        yield file


def kind_of(mode: int) -> str:
    """What a file mode says something is, in words."""
    kinds = {
        stat.S_IFREG: "a file",
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "no file")


def refuse_special(paths: Iterable[Path]) -> None:
    """Raise CheckpointError for pipes, sockets and devices among `paths`, before a library opens them and waits."""
    for path in paths:
        try:
            kind = kind_of(os.stat(path).st_mode)
        except OSError:
            continue  # a missing file is for the one who needs it to report
        if kind not in ("a file", "a folder"):
            raise CheckpointError(f"{path}: is {kind}, expected a regular file")


def content_sum(path: Path) -> tuple[str, Stamp]:
    """(SHA-256 of a file, the stamp of what was read); a file that did not change is read once in a process.

    Raises:
        CheckpointError: not a regular file, or it changed meanwhile.
        OSError: as `open`.
    """
    with opened(path) as file:
        stamp = Stamp.of(path, file.fileno())
        if stamp in _sums:
            return _sums[stamp], stamp
        found = file_digest(file, "sha256").hexdigest()
        stamp.check()
    # Clocks of file systems tick every few milliseconds: a younger file may yet change under the same stamp.
    if time.time_ns() - stamp.changed_ns > SETTLED_NS:
        _sums[stamp] = found
    return found, stamp


_sums: dict[Stamp, str] = {}


def sample_sum(path: Path, start: int = 0) -> str:
    """A hash of parts of a file, evenly spread from byte `start` on: tells the weights of two trainings apart."""
    digest = sha256()
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        step = max(SAMPLE_BYTES, (size - start) // SAMPLES)
        for at in range(start, size, step):
            digest.update(os.pread(file.fileno(), SAMPLE_BYTES, at))
    return digest.hexdigest()


def refuse_huge_ids(file: Path) -> None:
    """Raise CheckpointError for a tokenizer.json with a token of a number that no vocabulary has.

    The tokenizers library makes a table as long as the highest number, and aborts the process where there is no memory
    for it. Of a sound file the first look, at its bytes, is all that it takes.
    """
    if not file.is_file() or not HUGE_NUMBER.search(file.read_bytes()):
        return
    described = read_json(file)
    model, added = described.get("model"), described.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    numbers = dict(vocab) if isinstance(vocab, dict) else {}
    for entry in added if isinstance(added, list) else ():
        if isinstance(entry, dict):
            numbers[str(entry.get("content"))] = entry.get("id")
    for token, number in numbers.items():
        if isinstance(number, int) and number > LARGEST_SIZE:
            raise CheckpointError(
                f"{file}: token {shortened(repr(token))} has the number {shortened(number)}, and no vocabulary has "
                "that many tokens; copy the file from the model that it was made from"
            )
