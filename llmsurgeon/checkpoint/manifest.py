"""SHA-256 of a checkpoint's files: computed behind the writer, kept in `checksums.sha256`, checked afterwards."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from hashlib import file_digest, sha256
from pathlib import Path

from llmsurgeon.checkpoint.files import opened
from llmsurgeon.checkpoint.index import INDEX, WEIGHTS, read_index
from llmsurgeon.checkpoint.safetensors_file import SafetensorsFile
from llmsurgeon.errors import CheckpointError

MANIFEST = "checksums.sha256"  # `sha256sum -c checksums.sha256` reads it too
MARK = "# Written by llmsurgeon; it may replace the files named here, and no other."  # a comment to sha256sum
STEP = 1 << 24
SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with opened(path) as file:
        return file_digest(file, "sha256").hexdigest()


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


class FollowingHash(threading.Thread):
    """Hashes a file while it is being written, reading behind the writer from the page cache, and flushes it to disk.

    `size` is the file's final size, which it must already have; `key` is the caller's.
    """

    def __init__(self, path: Path, size: int, key: str) -> None:
        super().__init__(name=f"sha256 {path.name}", daemon=True)
        self.path, self.size, self.key = path, size, key
        self._written = 0
        self._awaited = 0
        self._abandoned = False
        self._changed = threading.Condition()
        self._digest = sha256()
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
        """Wait for the end, and the hash in hexadecimal."""
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


def write_manifest(folder: Path, known: Mapping[str, str]) -> None:
    """Write `checksums.sha256` over every visible file of `folder`; `known` holds the sums that need no reading."""
    lines = [f"{known.get(name) or file_sha256(path)}  {name}\n" for name, path in _files(folder).items()]
    (folder / MANIFEST).unlink(missing_ok=True)  # never through a link
    with (folder / MANIFEST).open("x", encoding="utf-8") as file:
        file.writelines([f"{MARK}\n", *lines])


@dataclass(frozen=True)
class Strangers:
    """What a folder holds: whether its manifest carries our mark, the files that it names, and whatever else is there.

    Names are relative; of a folder that the manifest knows nothing of, the folder's name alone.
    """

    marked: bool
    ours: tuple[str, ...]
    foreign: tuple[str, ...]


def strangers(folder: Path) -> Strangers:
    """Tell what this tool wrote into a folder from what it did not."""
    ours: tuple[str, ...] = ()
    marked = False
    with suppress(CheckpointError, OSError, UnicodeDecodeError):
        if not (folder / MANIFEST).is_symlink():
            ours = tuple(read_manifest(folder))
            marked = (folder / MANIFEST).read_text(encoding="utf-8").startswith(MARK)
    if not marked:
        ours = ()
    known = {*ours, MANIFEST}
    folders = {name.rpartition("/")[0] for name in ours} - {""}
    foreign: list[str] = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink() and name in folders:
            continue
        inside_foreign = any(name.startswith(f"{other}/") for other in foreign)
        if (name not in known or path.is_symlink() or path.is_dir()) and not inside_foreign:
            foreign.append(name)
    return Strangers(marked, ours, tuple(foreign))


def read_manifest(folder: Path) -> dict[str, str]:
    """File name -> SHA-256.

    Raises:
        CheckpointError: missing or malformed.
    """
    path = folder / MANIFEST
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    sums: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if line.startswith("#"):
            continue
        match = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        if not match or not is_plain(match[2]):
            raise CheckpointError(f"{path}: line {number} is not a SHA-256 and a file name")
        sums[match[2]] = match[1]
    return sums


def verify_files(folder: Path) -> list[str]:
    """Every problem with the files of a checkpoint folder; an empty list where all is well.

    Checks the hashes, that nothing is missing or extra, the headers of the weight files, and the index against them.
    A checkpoint without a manifest (not written by this tool) is checked for the rest.
    """
    if not folder.is_dir():
        return [f"{folder}: no such folder"]
    problems = _manifest_problems(folder) if (folder / MANIFEST).exists() else []
    weights: dict[str, set[str]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            weights[path.name] = set(SafetensorsFile(path).entries)
        except CheckpointError as error:
            problems.append(str(error))
    if (folder / INDEX).exists() and not (folder / WEIGHTS).exists():
        problems += _index_problems(folder, weights)
    return problems


def _manifest_problems(folder: Path) -> list[str]:
    try:
        sums = read_manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    present = _files(folder)
    problems = [f"{folder / name}: missing, the manifest lists it" for name in sums if name not in present]
    problems += [f"{path}: not in the manifest" for name, path in present.items() if name not in sums]
    for name, path in present.items():
        if name in sums and file_sha256(path) != sums[name]:
            problems.append(f"{path}: its content is not what was written (SHA-256 differs)")
    return problems


def _index_problems(folder: Path, weights: Mapping[str, set[str]]) -> list[str]:
    try:
        index = read_index(folder)
    except CheckpointError as error:
        return [str(error)]
    problems = [
        f"{folder / INDEX}: tensor {name!r} should be in {shard}, which does not have it"
        for name, shard in index.items()
        if shard in weights and name not in weights[shard]
    ]
    for shard, names in weights.items():
        problems += [
            f"{folder / INDEX}: does not list tensor {name!r} of {shard}" for name in sorted(names - set(index))
        ]
    return problems


def is_plain(name: str) -> bool:
    """True for the name of a file, or of a file in one folder, that can only lie inside a checkpoint."""
    parts = name.split("/")
    return len(parts) <= 2 and all(part not in ("", ".", "..") and Path(part).name == part for part in parts)


def _files(folder: Path) -> dict[str, Path]:
    """Visible files of a checkpoint by name, those in its folders (pooling configs) included."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in found.items() if name != MANIFEST and not re.search(r"(^|/)\.", name)}
