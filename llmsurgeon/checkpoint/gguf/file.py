"""One GGUF file: a strict reader of its metadata and tensor table (version 2 and 3, little-endian)."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from llmsurgeon.boundary.limits import MOST_FIELDS, MOST_TENSORS, MOST_VALUES
from llmsurgeon.checkpoint.files import Stamp, opened
from llmsurgeon.errors import CheckpointError

UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9  # types of values
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
MAX_DIMENSIONS = 4


@cache
def dequantises(kind: int) -> bool:
    """True where the gguf package turns this GGML type into numbers."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    known = GGMLQuantizationType(kind)
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[known][1]), np.uint8), known)
    except NotImplementedError:
        return False
    return True


@dataclass(frozen=True)
class Field:
    """One metadata value of a GGUF file: `kind` is its GGUF type, `inner` that of an array's elements."""

    key: str
    value: Any
    kind: int
    inner: int | None = None


@dataclass(frozen=True)
class GGUFEntry:
    """One tensor: `shape` in torch's order, `kind` the GGML type, bytes counted from the beginning of the file."""

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int
    end: int


class GGUFFile:
    """Metadata and tensor table of a GGUF file; tensors stay on disk.

    `kinds` holds the GGUF types of each value of `metadata`: its own and, of an array, that of the elements.

    Raises:
        CheckpointError: truncated, not GGUF, or its lengths and offsets do not fit the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with opened(path) as file:
                self.stamp = Stamp.of(path, file.fileno())
                self.size = self.stamp.size
                self._map = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error})") from error
        self._at = 0
        self.metadata: dict[str, Any] = {}
        self.kinds: dict[str, tuple[int, int | None]] = {}
        try:
            tensor_count, pair_count = self._read_preamble()
            for _ in range(pair_count):
                key = self._string()
                (kind,) = self._take("I")
                inner = struct.unpack_from("<I", self._map, self._at)[0] if kind == ARRAY else None
                self.metadata[key], self.kinds[key] = self._value(kind), (kind, inner)
            table = [self._table_row() for _ in range(tensor_count)]
        except (struct.error, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"{path}: truncated or damaged at byte {self._at:,} of {self.size:,} ({error}); download it again"
            ) from error
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise CheckpointError(f"{path}: general.alignment {alignment!r} is not a power of two")
        self.data_start = -(-self._at // alignment) * alignment
        self.entries = {row[0]: self._entry(*row) for row in table}
        if len(self.entries) != len(table):
            raise CheckpointError(f"{path}: two tensors have the same name")
        self._check_places(alignment)

    def _check_places(self, alignment: int) -> None:
        """Raise CheckpointError where the tensors are not one behind the other, each at the next aligned byte, with
        the last one at the end of the file: the format knows no gaps, so an offset, a type or a shape is wrong."""
        at, name = self.data_start, ""
        for entry in sorted(self.entries.values(), key=lambda entry: (entry.start, entry.end)):
            if entry.start != at:
                behind = f", behind {name!r}" if name else ""
                raise CheckpointError(
                    f"{self.path}: tensor {entry.name!r} starts at byte {entry.start:,}, expected {at:,}{behind}: its "
                    "offset or the type or shape of the one before is wrong; download it again"
                )
            at, name = -(-entry.end // alignment) * alignment, entry.name
        ends = max((entry.end for entry in self.entries.values()), default=self.size)
        # The last tensor may or may not be filled up.
        if self.size not in (ends, at):
            raise CheckpointError(
                f"{self.path}: its tensors end at byte {ends:,}, and the file has {self.size:,}; download it again"
            )

    def head(self) -> bytes:
        """Everything before the tensors' data."""
        return self._map[: self.data_start]

    def rows(self, name: str, first: int, last: int) -> np.ndarray:
        """Rows `first` to `last` (of the last dimension) in float32."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        entry = self.entries[name]
        kind = GGMLQuantizationType(entry.kind)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        row_bytes = entry.shape[-1] // block * block_bytes
        raw = np.frombuffer(self._map, np.uint8, (last - first) * row_bytes, entry.start + first * row_bytes)
        return dequantize(raw.reshape(last - first, row_bytes), kind).astype(np.float32, copy=False)

    @property
    def parts(self) -> tuple[GGUFFile, ...]:
        """The files that it is made of: itself, unless it is split."""
        return (self,)

    def bytes_of(self, entry: GGUFEntry, start: int, end: int) -> bytes:
        """Bytes `start` to `end` of a tensor as it is stored."""
        return self._map[entry.start + start : entry.start + end]

    def same_bytes(self, one: GGUFEntry, other: GGUFEntry) -> bool:
        """True where two tensors of one type and shape hold the same."""
        size, step = one.end - one.start, 1 << 24
        cuts = ((at, min(at + step, size)) for at in range(0, size, step))
        return all(self.bytes_of(one, *cut) == self.bytes_of(other, *cut) for cut in cuts)

    def _take(self, fields: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + fields, self._map, self._at)
        self._at += struct.calcsize("<" + fields)
        return values

    def _string(self) -> str:
        (length,) = self._take("Q")
        if length > self.size - self._at:
            raise struct.error(f"a string of {length:,} bytes is announced")
        start, self._at = self._at, self._at + length
        return self._map[start : self._at].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            inner, count = self._take("IQ")
            if count > min(self.size - self._at, MOST_VALUES):  # every element takes a byte at least
                raise struct.error(f"an array of {count:,} values is announced")
            if inner in SCALARS:
                return list(self._take(f"{count}{SCALARS[inner]}"))
            if inner == STRING:
                return [self._string() for _ in range(count)]
            raise struct.error(f"array of unknown type {inner}")
        if kind not in SCALARS:
            raise struct.error(f"value of unknown type {kind}")
        return self._take(SCALARS[kind])[0]

    def _read_preamble(self) -> tuple[int, int]:
        magic, version = self._take("4sI")
        if magic != b"GGUF":
            raise CheckpointError(f"{self.path}: not a GGUF file")
        if version not in (2, 3):
            raise CheckpointError(f"{self.path}: GGUF version {version} is not supported, 2 and 3 are")
        tensor_count, pair_count = self._take("QQ")
        for count, most, what in (
            (tensor_count, MOST_TENSORS, "tensors"),
            (pair_count, MOST_FIELDS, "metadata fields"),
        ):
            if count > most:
                raise CheckpointError(f"{self.path}: announces {count:,} {what}, expected at most {most:,}")
        return tensor_count, pair_count

    def _table_row(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        (dimensions,) = self._take("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise struct.error(f"tensor {name!r} with {dimensions} dimensions")
        shape = tuple(reversed(self._take(f"{dimensions}Q")))
        if 0 in shape:
            raise struct.error(f"tensor {name!r} of no numbers")
        kind, offset = self._take("IQ")
        return name, shape, kind, offset

    def _entry(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GGUFEntry:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        where = f"{self.path}: tensor {name!r}"
        try:
            known = GGMLQuantizationType(kind)
            block, block_bytes = GGML_QUANT_SIZES[known]
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{where}: unknown quantisation type {kind}; a newer `gguf` may know it") from error
        if not dequantises(kind):
            raise CheckpointError(f"{where}: the `gguf` package cannot dequantise {known.name}; a newer one may")
        if shape[-1] % block:
            raise CheckpointError(f"{where}: rows of {shape[-1]} are not whole blocks of {block}")
        start = self.data_start + offset
        end = start + prod(shape) // block * block_bytes
        if end > self.size:
            raise CheckpointError(
                f"{where}: truncated: it should end at byte {end:,}, the file has {self.size:,}; download it again"
            )
        return GGUFEntry(name, shape, kind, start, end)
