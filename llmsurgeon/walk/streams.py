"""Hidden states of a whole calibration batch, in memory or in a temporary file."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from llmsurgeon.checkpoint.kept import allocate, writing

# Streams above this many bytes live in a temporary file instead of memory.
STREAM_BYTES_IN_MEMORY = 6 << 30


class Streams:
    """Hidden states [S, T, D] of several variants; kept in a temporary file when memory would not hold them."""

    def __init__(self, count: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        size = count * torch.Size(shape).numel() * dtype.itemsize
        if size > STREAM_BYTES_IN_MEMORY:
            then = f"hidden states take {size:,} bytes there: set TMPDIR to a folder with room, or take fewer tokens"
            with writing(Path(tempfile.gettempdir()), then):
                self.data = self._mapped(size, dtype).view(count, *shape)
        else:
            self.data = torch.empty((count, *shape), dtype=dtype)

    def _mapped(self, size: int, dtype: torch.dtype) -> Tensor:
        """A tensor that is a temporary file, all of its room on the disk taken."""
        with tempfile.NamedTemporaryFile(prefix="llmsurgeon-streams-", delete=False) as file:
            try:
                allocate(file.fileno(), size)
                return torch.from_file(file.name, shared=True, size=size // dtype.itemsize, dtype=dtype)
            finally:
                os.unlink(file.name)  # mapped, it needs no name, and a kill leaves none
