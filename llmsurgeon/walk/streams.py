"""Hidden states of a whole calibration batch, in memory or in a temporary file."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from llmsurgeon.checkpoint.kept import allocate, writing
from llmsurgeon.processes.world import on_this_machine
from llmsurgeon.progress import remark
from llmsurgeon.walk.memory import room

# Streams above this share of the memory that is free live in a temporary file; the rest is for a layer's work.
SHARE_IN_MEMORY = 0.5
# And above this many bytes, where the system does not tell what is free.
STREAM_BYTES_IN_MEMORY = 6 << 30


class Streams:
    """Hidden states [S, T, D] of several variants; kept in a temporary file when memory would not hold them."""

    def __init__(self, count: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        numbers = torch.Size(shape).numel()
        size, free = count * numbers * dtype.itemsize, room()
        in_memory = SHARE_IN_MEMORY * free.bytes if free else STREAM_BYTES_IN_MEMORY
        if size <= in_memory / on_this_machine():
            self.data = torch.empty((count, *shape), dtype=dtype)
            return
        folder = tempfile.gettempdir()
        told = f", of {free.bytes / 1e9:.1f} GB that are free ({free.limit})" if free else ""
        remark(
            f"hidden states take {size / 1e9:.1f} GB ({count} x {numbers // shape[-1]:,} tokens x {shape[-1]:,} x "
            f"{dtype.itemsize} bytes){told}: they go into a file in {folder} (TMPDIR)"
        )
        then = f"hidden states take {size:,} bytes there: set TMPDIR to a folder with room, or take fewer tokens"
        with writing(Path(folder), then):
            self.data = self._mapped(size, dtype).view(count, *shape)

    def _mapped(self, size: int, dtype: torch.dtype) -> Tensor:
        """A tensor that is a temporary file, all of its room on the disk taken."""
        with tempfile.NamedTemporaryFile(prefix="llmsurgeon-streams-", delete=False) as file:
            try:
                allocate(file.fileno(), size)
                return torch.from_file(file.name, shared=True, size=size // dtype.itemsize, dtype=dtype)
            finally:
                os.unlink(file.name)  # mapped, it needs no name, and a kill leaves none


def copied(stream: Tensor) -> Tensor:
    """Another stream [S, T, D] that holds the same, in memory or in a file."""
    return Streams(1, tuple(stream.shape), stream.dtype).data[0].copy_(stream)
