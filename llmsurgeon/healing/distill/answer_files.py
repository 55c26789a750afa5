"""What the parent said about rows of text, in files: read and written row by row, each row with its checksum."""

from __future__ import annotations

import json
import os
import weakref
import zlib
from contextlib import AbstractContextManager
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llmsurgeon.checkpoint.kept import unfinished, writing

CHECKSUM = 4


class AnswerFiles:
    """One file for each kind of answer, by row, each row with its checksum; and one byte a row that says whether all of
    its answers are there.

    Rows are written and read by calls, not through a memory map, where a full disk or a file cut short is a signal that
    ends the process. Rows that were never written take no room.
    """

    def __init__(self, folder: Path, rows: int) -> None:
        self.folder = folder
        self.files: dict[str, _Rows] = {}
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
            self._known = os.open(folder / "known", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            weakref.finalize(self, os.close, self._known)
            self._flags = np.zeros(rows, np.uint8)
            noted = np.frombuffer(os.pread(self._known, rows, 0), np.uint8)
            self._flags[: len(noted)] = noted

    def _writing(self) -> AbstractContextManager[None]:
        return writing(self.folder, then="set LLMSURGEON_CACHE to a folder with room")

    def known(self, row: int) -> bool:
        return bool(self._flags[row])

    def put(self, name: str, row: int, value: Tensor) -> None:
        with self._writing():
            if name not in self.files:
                self.files[name] = _Rows.made(self.folder / name, tuple(value.shape), value.dtype)
            self.files[name].write(row, value)

    def know(self, rows: list[int]) -> None:
        """All at once: a kill before this makes a later run compute the same group of rows again."""
        self._flags[rows] = 1
        with self._writing():
            for row in rows:
                os.pwrite(self._known, b"\1", row)

    def get(self, name: str, row: int) -> Tensor | None:
        """The answer as it was put, None where it is not there or not whole."""
        if name not in self.files:
            found = _Rows.found(self.folder / name)
            if found is None:
                return None
            self.files[name] = found
        return self.files[name].read(row)


class _Rows:
    """A file of rows of one shape and dtype, each followed by four bytes of checksum."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self.size = prod(shape) * dtype.itemsize
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        weakref.finalize(self, os.close, self.fd)

    @classmethod
    def made(cls, path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> _Rows:
        """The file, its shape noted beside it."""
        note = path.with_name(f"{path.name}.json")
        with unfinished(note) as partial:
            partial.write_text(json.dumps({"shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}))
            partial.replace(note)
        return cls(path, shape, dtype)

    @classmethod
    def found(cls, path: Path) -> _Rows | None:
        """The file as its note describes it, None where either is not there."""
        try:
            noted = json.loads(path.with_name(f"{path.name}.json").read_text())
            shape, dtype = tuple(noted["shape"]), getattr(torch, noted["dtype"])
            return cls(path, shape, dtype) if path.is_file() else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def write(self, row: int, value: Tensor) -> None:
        data = value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        record = memoryview(data + zlib.crc32(data).to_bytes(CHECKSUM, "little"))
        at = row * len(record)
        while record:
            count = os.pwrite(self.fd, record, at)
            record, at = record[count:], at + count

    def read(self, row: int) -> Tensor | None:
        length = self.size + CHECKSUM
        record = bytearray(os.pread(self.fd, length, row * length))
        data = memoryview(record)[: self.size]
        if len(record) < length or zlib.crc32(data) != int.from_bytes(record[self.size :], "little"):
            return None
        return torch.frombuffer(record, dtype=self.dtype, count=prod(self.shape)).view(self.shape)
