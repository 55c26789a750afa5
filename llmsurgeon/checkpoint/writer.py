"""Write a checkpoint: staged in OUT.partial, resumed after a kill, renamed to OUT when all of it is there.

A journal in the staging folder names the job and every finished weight file. Tensors that no edit touches
go from file to file inside the kernel; only edited ones pass through memory, a block at a time.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from torch import Tensor

from llmsurgeon.checkpoint.job import fingerprint_of
from llmsurgeon.checkpoint.manifest import MANIFEST, FollowingHash, file_sha256, is_plain, write_manifest
from llmsurgeon.checkpoint.shards import Shard, index_json, meta_weights, parse_size, plan_shards
from llmsurgeon.checkpoint.source import INDEX
from llmsurgeon.checkpoint.weight_file import Progress, Reporter, write_shard
from llmsurgeon.errors import SurgeryError

JOURNAL = ".journal.json"
JOURNAL_NEW = ".journal.json.new"
SCRATCH = ".scratch"
MAX_HASHES = 3  # SHA-256 runs at about a third of the speed of a copy


class Stage:
    """The staging folder of one output. Use as a context manager; `commit()` makes OUT appear.

    Leaving without `commit()` keeps the folder, and the same job opened again goes on from there.
    """

    def __init__(self, out: Path, partial: Path, lock: int, overwrite: bool) -> None:
        self.out = out
        self.path = partial
        self.committed = False
        self._lock: int | None = lock
        self._overwrite = overwrite
        self._journal: dict = {}
        self._sums: dict[str, str] = {}
        self._weights_written = False

    @classmethod
    def open(
        cls,
        out: str | os.PathLike[str],
        *,
        job: Mapping[str, str],
        overwrite: bool = False,
        sources: tuple[Path, ...] = (),
        needed_bytes: int = 0,
    ) -> Stage:
        """Open OUT.partial, where the same job goes on if it was there before.

        `job` is all that the result depends on, part by part (name -> short text or hash): the journal keeps it.
        `sources` are folders that are read and must survive; `needed_bytes` is what will be written.

        Raises:
            SurgeryError: OUT exists and `overwrite` is off, is a source, cannot be written, lacks space, or
                another run is writing it. Nothing has been written then.
        """
        target = Path(out).expanduser().resolve()
        partial = target.with_name(target.name + ".partial")
        _check_sources(target, partial, sources)
        _check_parent(target.parent)
        with _explained(partial, needed_bytes, staged=False):
            partial.mkdir(exist_ok=True)
            stage = cls(target, partial, _lock_folder(partial, target), overwrite)
            try:
                _recover_replaced(target)
                _check_existing(target, overwrite)
                stage._resume_or_clear(job)
                stage._check_space(needed_bytes)
            except BaseException:
                stage.close()
                raise
        return stage

    @staticmethod
    def check(out: str | os.PathLike[str], *, overwrite: bool = False, sources: tuple[Path, ...] = ()) -> None:
        """Raise what `open` would raise for this place, without touching it: before the work that leads there."""
        target = Path(out).expanduser().resolve()
        _check_sources(target, target.with_name(target.name + ".partial"), sources)
        _check_parent(target.parent)
        _check_existing(target, overwrite)

    def __enter__(self) -> Stage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the lock. What was staged stays; a folder with nothing in it to resume does not."""
        if self._lock is None:
            return
        if not self.committed and not self._resumable():
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
        self._lock = None

    def _resumable(self) -> bool:
        """True where something besides the journal is there, be it an intermediate result."""
        names = {path.name for path in self.path.iterdir()} - {JOURNAL, JOURNAL_NEW}
        return bool(names - {SCRATCH}) or (SCRATCH in names and any((self.path / SCRATCH).iterdir()))

    def _resume_or_clear(self, job: Mapping[str, str]) -> None:
        journal = self.path / JOURNAL
        if any(path.name != JOURNAL_NEW for path in self.path.iterdir()) and not journal.exists():
            raise SurgeryError(f"{self.path}: exists and was not written by this tool; move it away or delete it")
        old: dict = {}
        with suppress(FileNotFoundError, ValueError):  # a damaged journal means starting afresh
            old = json.loads(journal.read_text())
        fingerprint = fingerprint_of(job)
        resumed = old.get("fingerprint") == fingerprint
        self._journal = {"fingerprint": fingerprint, "job": dict(job), "files": old["files"] if resumed else {}}
        self._save_journal()  # first, so that a kill while clearing cannot mix two jobs
        keep = {JOURNAL, *self._journal["files"], *([SCRATCH] if resumed else [])}
        for path in list(self.path.iterdir()):
            if path.name not in keep:
                _remove(path)

    def _save_journal(self) -> None:
        temporary = self.path / JOURNAL_NEW
        temporary.write_text(json.dumps(self._journal))
        temporary.replace(self.path / JOURNAL)

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.path).free + sum(
            (self.path / file).stat().st_size for file in self._journal["files"] if (self.path / file).exists()
        )
        if needed > free:
            raise SurgeryError(
                f"{self.path.parent}: {needed:,} bytes are needed and {free:,} are free; free some space or choose "
                "another output folder"
            )

    @property
    def scratch(self) -> Path:
        """A folder for intermediate results of this job: survives a kill, is gone after `commit()`."""
        folder = self.path / SCRATCH
        with _explained(folder):
            folder.mkdir(exist_ok=True)
        return folder

    def write_file(self, name: str, content: str | bytes) -> None:
        """Write one small file."""
        path = self._inside(name)
        with _explained(path, len(content)):
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    def copy_file(self, source: Path, name: str | None = None) -> None:
        """Copy one small file (links followed), under `name` if given, which may lie in a folder."""
        path = self._inside(name or source.name)
        with _explained(path):
            path.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, path)

    def _inside(self, name: str) -> Path:
        if not is_plain(name) or name.partition("/")[0] in (JOURNAL, SCRATCH, MANIFEST):
            raise AssertionError(f"{name!r} is not a file name for a checkpoint")
        return self.path / name

    def write_weights(
        self,
        weights: Mapping[str, Tensor],
        *,
        max_shard_size: int | str = "5GB",
        progress: Progress | None = None,
        check_finite: bool = True,
    ) -> int:
        """Write every tensor of `weights`, and the index where there is more than one file; return the bytes written.

        Bytes that no edit touches are copied from file to file. Files that a killed run of the same job finished
        are kept once their SHA-256 has been checked. `progress` is called with (bytes done, bytes in total).

        Raises:
            SurgeryError: a computed tensor holds NaN or infinity, or the disk fails or is full.
        """
        if self._weights_written:
            raise AssertionError("write_weights was called twice on one stage")
        meta = meta_weights(weights)
        shards = plan_shards(weights, meta, parse_size(max_shard_size))
        total = sum(shard.size for shard in shards)
        done = {shard.file: total_sum for shard in shards if (total_sum := self._finished(shard)) is not None}
        self._drop_unplanned(set(done))
        self._check_space(total)
        report = Reporter(progress, total)
        hashes: list[FollowingHash] = []
        try:
            for shard in shards:
                if shard.file in done:
                    report(shard.size)
                    continue
                while len(hashes) >= MAX_HASHES:
                    self._record(hashes.pop(0))
                with _explained(self.path / shard.file, shard.size):
                    hashes.append(write_shard(self.path, shard, weights, meta, check_finite, report))
            for following in hashes:
                self._record(following)
        except BaseException:
            # These files are whole: kept, they need not be made again.
            for following in hashes:
                with suppress(Exception):
                    self._record(following)
            raise
        self._sums.update({file: entry["sha256"] for file, entry in self._journal["files"].items()})
        if len(shards) > 1:
            self.write_file(INDEX, index_json(shards, meta))
        self._weights_written = True
        return total

    def _finished(self, shard: Shard) -> str | None:
        """The SHA-256 of a file that an earlier run finished, if it is still what the journal says."""
        entry = self._journal["files"].get(shard.file)
        path = self.path / shard.file
        if not entry or entry["key"] != shard.key or not path.is_file() or path.stat().st_size != shard.size:
            return None
        return entry["sha256"] if file_sha256(path) == entry["sha256"] else None

    def _drop_unplanned(self, keep: set[str]) -> None:
        self._journal["files"] = {file: entry for file, entry in self._journal["files"].items() if file in keep}
        self._save_journal()
        for path in [*self.path.glob("*.safetensors"), self.path / INDEX]:
            if path.name not in keep:
                path.unlink(missing_ok=True)

    def _record(self, following: FollowingHash) -> None:
        with _explained(following.path):
            digest = following.result()
            self._journal["files"][following.path.name] = {"sha256": digest, "key": following.key}
            self._save_journal()

    def commit(self) -> Path:
        """Write the manifest, flush everything to disk and rename OUT.partial to OUT. Returns OUT.

        With `overwrite` the old OUT is moved aside first and removed last: whenever this is killed, the old or the
        new one is complete, under OUT or (for an instant) OUT.replaced, which the next run puts back.
        """
        with _explained(self.path):
            _remove(self.path / SCRATCH)
            write_manifest(self.path, self._sums)
            for path in sorted(self.path.rglob("*")):
                _fsync(path)
            replaced = _replaced(self.out)
            if self.out.exists() and any(self.out.iterdir()):
                _check_existing(self.out, self._overwrite)  # it may have appeared meanwhile
                _remove(replaced)  # the rest of a replaced checkpoint whose removal was interrupted
                self.out.rename(replaced)
            self.path.rename(self.out)
            (self.out / JOURNAL).unlink()
            _fsync(self.out.parent)
            _remove(replaced)
        self.committed = True
        self.close()
        return self.out


def _check_sources(target: Path, partial: Path, sources: tuple[Path, ...]) -> None:
    for source in sources:
        real = source.resolve()
        if real.is_relative_to(target) or real.is_relative_to(partial):
            raise SurgeryError(f"{target}: is where the model is read from; choose another output folder")


def _check_existing(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise SurgeryError(f"{target}: exists and is not a folder; choose another output folder")
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise SurgeryError(f"{target}: exists already; choose another output folder or pass --overwrite")
    if not (target / "config.json").exists() and not (target / MANIFEST).exists():
        raise SurgeryError(
            f"{target}: holds files but is not a checkpoint, so it is not overwritten; delete it yourself"
        )


def _check_parent(parent: Path) -> None:
    ancestor = next(path for path in (parent, *parent.parents) if path.exists())
    if not ancestor.is_dir():
        raise SurgeryError(f"{parent}: cannot be created, because {ancestor} is a file")
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise SurgeryError(f"{ancestor}: no permission to write here; choose another output folder")
    with _explained(parent, staged=False):
        parent.mkdir(parents=True, exist_ok=True)


def _lock_folder(folder: Path, target: Path) -> int:
    """Lock the staging folder itself, so that no lock file is left behind; returns the descriptor that holds it."""
    while True:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.stat(folder)):
                return fd
        except FileNotFoundError:
            folder.mkdir(exist_ok=True)  # renamed or removed between open and lock, by a run that just ended
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
                os.close(fd)
                raise SurgeryError(f"{target}: another run is writing it now; wait for it or stop it") from error
            if error.errno in (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                return fd  # a network file system without locks on folders
            os.close(fd)
            raise
        os.close(fd)


def _replaced(target: Path) -> Path:
    return target.with_name(target.name + ".replaced")


def _recover_replaced(target: Path) -> None:
    """A kill between the two renames of an overwrite leaves the old checkpoint under its other name: put it back."""
    if not target.exists() and _replaced(target).exists():
        _replaced(target).rename(target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def disk_trouble(error: OSError) -> str:
    """What went wrong while writing, in words."""
    return {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: "the file would exceed the size that the system allows",
        errno.EACCES: "no permission to write",
        errno.EPERM: "not permitted to write",
        errno.EROFS: "the file system is read-only",
    }.get(error.errno or 0, error.strerror or str(error))


@contextmanager
def _explained(path: Path, needed: int = 0, staged: bool = True) -> Iterator[None]:
    """Turn errors of the disk into a SurgeryError that says what to do."""
    try:
        yield
    except OSError as error:
        what = disk_trouble(error)
        need = f" ({needed:,} bytes needed)" if needed else ""
        after = (
            "What is finished stays in the .partial folder; the same command started again goes on from there"
            if staged
            else "Choose another output folder"
        )
        raise SurgeryError(f"{error.filename or path}: {what}{need}. {after}") from error
