"""One safetensors file: a strict reader of its header, views of its tensors, and the header's writer.

The layout: 8 bytes little-endian header length, the header as JSON, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import mmap
import struct
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from llmsurgeon.boundary.foreign import json_object
from llmsurgeon.checkpoint.files import Stamp, opened
from llmsurgeon.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: `start` and `end` count bytes from the beginning of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """A safetensors file opened by its header alone.

    Raises:
        CheckpointError: the header is truncated, is not JSON, or does not agree with the file's size.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with opened(path) as file:
                self.stamp = Stamp.of(path, file.fileno())
                self.size = self.stamp.size
                self.header, self.data_start = _read_header(path, file.read, self.size)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        self.entries = _parse_header(path, self.header, self.data_start, self.size)
        self._map: mmap.mmap | None = None

    def tensor(self, name: str) -> Tensor:
        """A view of the file's pages. Writing to it changes private memory, never the file."""
        entry = self.entries[name]
        if entry.start == entry.end:
            return torch.empty(entry.shape, dtype=entry.dtype)
        if self._map is None:
            self.stamp.check()
            with opened(self.path) as file:
                self._map = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            self.stamp.check()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            raw = torch.frombuffer(self._map, dtype=torch.uint8, count=entry.end - entry.start, offset=entry.start)
        if entry.start % entry.dtype.itemsize:
            raw = raw.clone()  # headers written without padding leave tensors unaligned
        return raw.view(entry.dtype).view(entry.shape)


def _read_header(path: Path, read: Callable[[int], bytes], size: int) -> tuple[bytes, int]:
    prefix = read(8)
    if len(prefix) < 8:
        raise CheckpointError(f"{path}: truncated: {size} bytes, a safetensors file has at least 8; download it again")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: not a safetensors file: it announces a header of {length:,} bytes, "
            f"the limit is {MAX_HEADER_BYTES:,}; download it again"
        )
    if 8 + length > size:
        raise CheckpointError(
            f"{path}: truncated: the header should be {length:,} bytes and the file has {size:,}; download it again"
        )
    return read(length), 8 + length


def _parse_header(path: Path, header: bytes, data_start: int, size: int) -> dict[str, TensorEntry]:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        made = dict(pairs)
        if len(made) != len(pairs):
            twice = min(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
            raise CheckpointError(f"{path}: the header names {twice!r} twice")
        return made

    where = f"{path}: the safetensors header"
    try:
        text = header.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where} is not JSON ({error}); download it again") from error
    table = json_object(text, where, object_pairs_hook=unique)
    table.pop("__metadata__", None)
    entries = sorted((_entry(path, name, fields, data_start) for name, fields in table.items()), key=lambda e: e.start)
    at = data_start
    for entry in entries:
        if entry.start != at:
            raise CheckpointError(
                f"{path}: tensor {entry.name!r} starts at byte {entry.start:,}, expected {at:,}: "
                "the tensors overlap or leave a gap"
            )
        at = entry.end
    if at != size:
        what = "truncated" if size < at else "followed by unknown bytes"
        raise CheckpointError(f"{path}: {what}: the header describes {at:,} bytes, the file has {size:,}")
    return {entry.name: entry for entry in entries}


def _entry(path: Path, name: str, fields: object, data_start: int) -> TensorEntry:
    where = f"{path}: tensor {name!r}"
    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= set(fields):
        raise CheckpointError(f"{where}: the header must give dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where}: dtype {dtype!r} is not supported; supported are {', '.join(DTYPES)}")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: shape {shape!r} and data_offsets {offsets!r} must be lists of whole numbers")
    start, end = offsets
    needed = prod(shape) * DTYPES[dtype].itemsize
    if end - start != needed:
        raise CheckpointError(
            f"{where}: {dtype} of shape {tuple(shape)} takes {needed:,} bytes, data_offsets span {end - start:,}"
        )
    return TensorEntry(name, DTYPES[dtype], tuple(shape), data_start + start, data_start + end)


def _sizes(value: object) -> bool:
    # bool is an int to Python; the upper bound keeps a hostile shape from overflowing torch's 64-bit sizes.
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**62 for n in value)


def encode_header(tensors: Sequence[tuple[str, torch.dtype, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a file that holds `tensors` in the given order, padded so that data starts at a multiple of 8.

    Raises:
        CheckpointError: a dtype has no safetensors name.
    """
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for name, dtype, shape in tensors:
        if dtype not in DTYPE_NAMES:
            raise CheckpointError(f"tensor {name!r}: safetensors cannot hold {dtype}")
        end = at + prod(shape) * dtype.itemsize
        table[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header
