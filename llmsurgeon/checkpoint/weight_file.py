"""One weight file being written: byte ranges that are copied inside the kernel, tensors that are computed in blocks."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmsurgeon.checkpoint.checksums import Checksum
from llmsurgeon.checkpoint.finite import is_finite
from llmsurgeon.checkpoint.following import FollowingSum
from llmsurgeon.checkpoint.shards import Shard
from llmsurgeon.checkpoint.source import Checkpoint
from llmsurgeon.checkpoint.transform import TransformedWeights, blocks, root_of
from llmsurgeon.errors import CheckpointError, SurgeryError

COPY_STEP = 1 << 26
UNIT = 1 << 16  # a multiple of the block of every file system

Progress = Callable[[int, int], None]


class Reporter:
    """Counts bytes, and tells `progress` how many are done of how many."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, count: int) -> None:
        self.done += count
        if self.progress:
            self.progress(self.done, self.total)


@dataclass(frozen=True)
class Manner:
    """How weight files are written: by which checksum, whether computed numbers must be finite, who hears of it."""

    checksum: Checksum
    check_finite: bool
    report: Reporter


def write_shard(
    folder: Path, shard: Shard, weights: Mapping[str, Tensor], meta: Mapping[str, Tensor], manner: Manner
) -> FollowingSum:
    """Write one file; return the sum that follows it."""
    path = folder / shard.file
    path.unlink(missing_ok=True)  # a link that stands there is not followed
    with path.open("xb") as file:
        os.truncate(file.fileno(), shard.size)
        following = FollowingSum(path, shard.size, shard.key, manner.checksum)
        try:
            out = _Output(file.fileno(), following, manner.report)
            out.write(shard.header)
            for source in steps(shard, weights):
                if isinstance(source, Range):
                    out.copy(source)
                else:
                    _write_computed(out, source, weights, meta[source], manner.check_finite)
        except BaseException:
            following.abandon()
            raise
    if out.at != shard.size:
        raise AssertionError(f"{path}: wrote {out.at} bytes of {shard.size}")
    return following


@dataclass(frozen=True)
class Range:
    """Bytes `start` to `end` of a file."""

    path: Path
    start: int
    end: int


def steps(shard: Shard, weights: Mapping[str, Tensor]) -> Iterator[Range | str]:
    """The shard's tensors in order: names to compute and byte ranges to copy, neighbours merged."""
    pending: Range | None = None
    for name in shard.names:
        found = _location(weights, name)
        if found and pending and found.path == pending.path and found.start == pending.end:
            pending = Range(found.path, pending.start, found.end)
            continue
        if pending:
            yield pending
        pending = found
        if not found:
            yield name
    if pending:
        yield pending


def copied(shard: Shard, weights: Mapping[str, Tensor], meta: Mapping[str, Tensor]) -> Iterator[tuple[int, Range]]:
    """What is copied to which place of the shard."""
    at = len(shard.header)
    for source in steps(shard, weights):
        if isinstance(source, Range):
            yield at, source
            at += source.end - source.start
        else:
            at += meta[source].numel() * meta[source].dtype.itemsize


def _location(weights: Mapping[str, Tensor], name: str) -> Range | None:
    root = root_of(weights)
    origin = weights.origin(name) if isinstance(weights, TransformedWeights) else name
    if origin is None or not isinstance(root, Checkpoint):
        return None
    location = root.location(origin)
    return Range(*location) if location else None


def _write_computed(
    out: _Output, name: str, weights: Mapping[str, Tensor], planned: Tensor, check_finite: bool
) -> None:
    before = out.at
    with closing(blocks(weights, name)) as made:
        for block in made:
            if block.dtype != planned.dtype or block.shape[1:] != planned.shape[1:]:
                raise AssertionError(f"{name}: made {block.dtype} {tuple(block.shape)}, planned {planned.dtype}")
            if check_finite:
                raise_unless_finite(name, block)
            raw = block.detach().cpu().contiguous().flatten().view(torch.uint8)
            out.write(raw.numpy().data)
    if out.at - before != planned.numel() * planned.dtype.itemsize:
        raise AssertionError(f"{name}: wrote {out.at - before} bytes, planned {tuple(planned.shape)}")
    if isinstance(weights, TransformedWeights) and name == weights.group(name)[-1]:
        weights.release()


def raise_unless_finite(name: str, tensor: Tensor) -> None:
    """Raise SurgeryError naming `name` where `tensor` holds NaN or infinity."""
    if not is_finite(tensor):
        raise SurgeryError(
            f"tensor {name!r}: the result holds NaN or infinity. Run `llmsurgeon verify` on the source; if it is "
            "sound, the edit overflows the dtype"
        )


class _Output:
    """A file being written from its beginning on."""

    def __init__(self, fd: int, following: FollowingSum, report: Reporter) -> None:
        self.fd, self.following, self.report, self.at = fd, following, report, 0

    def _advance(self, count: int) -> None:
        self.at += count
        self.following.advance(self.at)
        self.report(count)

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            count = os.write(self.fd, view[:COPY_STEP])
            self._advance(count)
            view = view[count:]

    def copy(self, source: Range) -> None:
        fd = os.open(source.path, os.O_RDONLY)
        try:
            at = source.start
            while at < source.end:
                # From one whole unit to another: where both files have blocks there, the file system may share them.
                step = COPY_STEP if at % UNIT == 0 else UNIT - at % UNIT
                count = copy_bytes(fd, self.fd, at, self.at, min(step, source.end - at))
                if not count:
                    raise CheckpointError(
                        f"{source.path}: the file became shorter while it was being read; start again"
                    )
                at += count
                self._advance(count)
        finally:
            os.close(fd)


UNSUPPORTED = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM, errno.ETXTBSY}


def copy_bytes(source: int, target: int, source_at: int, target_at: int, count: int) -> int:
    """Copy up to `count` bytes between open files, inside the kernel where it can. Returns the bytes copied.

    Advances `target`'s own position to the end of what was copied.
    """
    for copy in (_copy_file_range, _sendfile, _copy_through_memory):
        try:
            copied = copy(source, target, source_at, target_at, count)
        except OSError as error:
            if error.errno not in UNSUPPORTED or copy is _copy_through_memory:
                raise
            continue
        os.lseek(target, target_at + copied, os.SEEK_SET)
        return copied
    raise AssertionError("unreachable")


def _copy_file_range(source: int, target: int, source_at: int, target_at: int, count: int) -> int:
    if not hasattr(os, "copy_file_range"):
        raise OSError(errno.ENOSYS, "no copy_file_range on this system")
    return os.copy_file_range(source, target, count, source_at, target_at)


def _sendfile(source: int, target: int, source_at: int, target_at: int, count: int) -> int:
    if not hasattr(os, "sendfile"):
        raise OSError(errno.ENOSYS, "no sendfile on this system")
    os.lseek(target, target_at, os.SEEK_SET)
    return os.sendfile(target, source, source_at, count)


def _copy_through_memory(source: int, target: int, source_at: int, target_at: int, count: int) -> int:
    return os.pwrite(target, os.pread(source, min(count, 1 << 22), source_at), target_at)
