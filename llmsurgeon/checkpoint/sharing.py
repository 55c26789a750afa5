"""Bytes that two files have in common: where a file system can share blocks, what is copied costs no disk and no time.

XFS, btrfs and others let a copy inside the kernel refer to the blocks of the original (`copy_file_range`), where both
places in the files lie at the beginning of a block. A safetensors file has no gaps between tensors, but its header may
be longer than it needs to be, and so all that follows may be moved to where most of it lies as it did in the source.
"""

from __future__ import annotations

import os
import struct
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile

from llmsurgeon.checkpoint.shards import Shard
from llmsurgeon.checkpoint.weight_file import Range

FICLONERANGE = 0x4020940D  # linux/fs.h
ALIGNMENT = 8  # of the data in a safetensors file


def shared_blocks(source: Path, folder: Path) -> int:
    """The block size by which files in `folder` can share what lies in the file `source`; 0 where they cannot."""
    if not sys.platform.startswith("linux"):
        return 0
    from fcntl import ioctl

    block = os.statvfs(folder).f_bsize
    try:
        with source.open("rb") as file, TemporaryFile(dir=folder) as trial:
            ioctl(trial.fileno(), FICLONERANGE, struct.pack("qQQQ", file.fileno(), 0, block, 0))
    except OSError:
        return 0
    return block


def aligned(shard: Shard, copied: Iterable[tuple[int, Range]], block: int) -> Shard:
    """The shard with a header so long that most of what is copied lies in its blocks as it did in the source.

    copied: what is copied to which place of the file.
    """
    bytes_by_pad: Counter[int] = Counter()
    for place, source in copied:
        bytes_by_pad[(source.start - place) % block] += source.end - source.start
    possible = {pad: count for pad, count in bytes_by_pad.items() if pad % ALIGNMENT == 0}
    if not possible:
        return shard
    pad = max(possible, key=lambda pad: (possible[pad], -pad))
    held = shard.header[8:] + b" " * pad
    return replace(shard, header=struct.pack("<Q", len(held)) + held, size=shard.size + pad)
