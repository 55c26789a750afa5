"""Memory of the process: how much more of it there is, and keeping the C library from giving it back between layers.

glibc returns every large block to the kernel when it is freed and faults it in again page by page when the next layer
wants the same amount: half of the CPU time of a walk, measured on a 135M model.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# Files of a control group, in version 2 and 1: its limit, what it takes, and what of that is cache of files.
GROUP_FILES = (
    ("memory.max", "memory.current", ("active_file", "inactive_file")),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
)


@dataclass(frozen=True, order=True)
class Room:
    """How many bytes more a process may take, and what says so."""

    bytes: int
    limit: str


def room() -> Room | None:
    """What this process may still take: the least that the machine, its control groups and its own limits leave.

    Cache of files counts as free, since the kernel gives it up, and so does what this process has freed and kept, which
    it gives back here. None where the system does not tell.
    """
    if not sys.platform.startswith("linux"):
        return None
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return min([*_of_machine(), *_of_groups(), *_of_process()], default=None)


def taken() -> int:
    """Bytes of memory that this process takes, pages of files left out; 0 where the system does not tell."""
    return _kilobytes(PROC / "self/status", "RssAnon") or 0


def _of_machine() -> Iterator[Room]:
    if (free := _kilobytes(PROC / "meminfo", "MemAvailable")) is not None:
        yield Room(free, "what the machine has free")


def _of_groups() -> Iterator[Room]:
    for line in _text(PROC / "self/cgroup").splitlines():
        _, controllers, place = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        for top in (CGROUPS, CGROUPS / "memory", CGROUPS / "unified"):
            # A group has what those above it leave, too; in a container the path may begin somewhere else.
            folder = top / place.strip("/")
            for group in (folder, *folder.parents):
                if group.is_relative_to(top):
                    yield from _of_group(group)


def _of_group(group: Path) -> Iterator[Room]:
    for limit, taken, cached in GROUP_FILES:
        with suppress(ValueError):  # "max", or no such file
            most, now = int(_text(group / limit)), int(_text(group / taken))
            stat = _text(group / "memory.stat")
            files = sum(
                int(found[1]) for name in cached if (found := re.search(rf"^{name} (\d+)$", stat, re.MULTILINE))
            )
            yield Room(max(0, most - now + files), "the memory limit of its control group")


def _of_process() -> Iterator[Room]:
    import resource

    for kind, taken, name in (
        (resource.RLIMIT_AS, "VmSize", "address space (ulimit -v)"),
        (resource.RLIMIT_DATA, "VmData", "data (ulimit -d)"),
    ):
        limit, now = resource.getrlimit(kind)[0], _kilobytes(PROC / "self/status", taken)
        if limit != resource.RLIM_INFINITY and now is not None:
            yield Room(max(0, limit - now), f"its limit of {name}")


def _kilobytes(path: Path, name: str) -> int | None:
    found = re.search(rf"^{name}:\s+(\d+) kB$", _text(path), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def keep_freed_memory() -> None:
    """Let freed blocks be used again by this process. Does nothing where the C library is not glibc."""
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 64 << 20)
