"""Checksums of files: what can be asked for, the file of a checkpoint that holds them, how each is made."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import file_digest, sha256
from io import BufferedReader
from pathlib import Path
from typing import Literal, Protocol

from blake3 import blake3

from llmsurgeon.boundary.foreign import shortened
from llmsurgeon.checkpoint.files import opened
from llmsurgeon.errors import SurgeryError

ChecksumName = Literal["blake3", "sha256", "none"]

READ_STEP = 1 << 24  # enough to be shared out over the cores
# Threads that BLAKE3 shares a large file among: as many as its pool has.
_threads = blake3.AUTO


class Digest(Protocol):
    """A sum in the making."""

    def update(self, data: bytes | memoryview, /) -> object:
        """Take in what comes next."""

    def hexdigest(self) -> str:
        """The sum of all that was taken in, in hexadecimal."""


@dataclass(frozen=True)
class Checksum:
    """One kind of checksum.

    manifest: the name of the file that holds those of a checkpoint.
    title: what it is called in messages.
    sum: what one looks like, a regular expression.
    begin: begins a sum of bytes to come, on the thread that brings them.
    of_file: the sum of an open file, on all cores where the kind can.
    comments: whether the tools that read its manifest pass over lines with a #.
    """

    manifest: str
    title: str
    sum: str
    begin: Callable[[], Digest]
    of_file: Callable[[BufferedReader], str]
    comments: bool = True


class _Count:
    """Counts bytes, and looks at none."""

    def __init__(self) -> None:
        self.size = 0

    def update(self, data: bytes | memoryview, /) -> None:
        self.size += memoryview(data).nbytes

    def hexdigest(self) -> str:
        return str(self.size)


def _forked() -> None:
    """In a forked process: the pool's threads did not come along, and who gave them work would wait forever."""
    global _threads
    _threads = 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def _blake3_of(file: BufferedReader) -> str:
    # Read and not mapped: a file that becomes shorter meanwhile is an error and no signal.
    digest, size = blake3(max_threads=_threads), os.fstat(file.fileno()).st_size
    buffer = memoryview(bytearray(min(READ_STEP, size + 1)))
    while count := file.raw.readinto(buffer):
        digest.update(buffer[:count])
    return digest.hexdigest()


CHECKSUMS: dict[str, Checksum] = {
    # `b3sum -c checksums.b3` reads it too
    "blake3": Checksum("checksums.b3", "BLAKE3", "[0-9a-f]{64}", blake3, _blake3_of, comments=False),
    # `sha256sum -c checksums.sha256` reads it too
    "sha256": Checksum(
        "checksums.sha256", "SHA-256", "[0-9a-f]{64}", sha256, lambda file: file_digest(file, "sha256").hexdigest()
    ),
    "none": Checksum("checksums.none", "size", r"\d{1,19}", _Count, lambda file: str(os.fstat(file.fileno()).st_size)),
}
MANIFESTS = {checksum.manifest: checksum for checksum in CHECKSUMS.values()}


def checksum_of(name: str) -> Checksum:
    """The kind of checksum of that name.

    Raises:
        SurgeryError: there is none.
    """
    if name not in CHECKSUMS:
        raise SurgeryError(f"checksum {shortened(repr(name))}: expected one of {', '.join(CHECKSUMS)}")
    return CHECKSUMS[name]


def file_sum(path: Path, checksum: Checksum) -> str:
    """The checksum of a regular file.

    Raises:
        CheckpointError: not a regular file.
        OSError: as `open`.
    """
    with opened(path) as file:
        return checksum.of_file(file)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    return file_sum(path, CHECKSUMS["sha256"])


def is_sum(text: str, checksum: Checksum) -> bool:
    """Whether that is how a sum of this kind looks."""
    return re.fullmatch(checksum.sum, text, re.ASCII) is not None
