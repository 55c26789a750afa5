"""OUT.partial: where an output is prepared, marked as this tool's, locked while in use, gone on with after a kill.

    lock       held for as long as a run writes here
    job.json   the mark: whose work this is, since when, and which of its files are finished
    scratch/   intermediate results, which may be hours of training
    result     what becomes OUT by one rename: a folder, or a file where OUT is one

Only what carries the mark is touched, and of an OUT that is replaced only what its manifest names. Nothing is deleted
before the step that makes it superfluous has succeeded: OUT appears first, then the old one and the scratch go. A kill
at any moment leaves OUT as it was or whole; what is left in OUT.partial is put in order by the next run.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self
from uuid import uuid4

from llmsurgeon.checkpoint.atomic import exchange, fsync, move
from llmsurgeon.checkpoint.disk import ELSEWHERE, GOES_ON, NOTHING, disk_trouble, explained
from llmsurgeon.checkpoint.job import differences, fingerprint_of
from llmsurgeon.checkpoint.lock import Hold, hold
from llmsurgeon.checkpoint.manifest import MANIFEST, file_sha256, strangers
from llmsurgeon.checkpoint.out_place import check_existing, partial_of, place_of
from llmsurgeon.errors import SurgeryError

JOURNAL, JOURNAL_NEW, LOCK = "job.json", "job.json.new", "lock"
SCRATCH, RESULT, REPLACED = "scratch", "result", "replaced"
KINDS = {
    LOCK: stat.S_ISREG,
    JOURNAL: stat.S_ISREG,
    JOURNAL_NEW: stat.S_ISREG,
    SCRATCH: stat.S_ISDIR,
    REPLACED: stat.S_ISDIR,
}
MARK = "llmsurgeon staging"  # a key of job.json
HOW_FAR = "how-far.txt"  # what a job may write into its scratch, for people: a line


class Staging:
    """The staging folder of one output. Use as a context manager.

    Leaving without a commit keeps the folder where something in it can be gone on with.
    """

    # Whether OUT is one file, of which nothing is kept that is not whole.
    single_file: ClassVar[bool] = False

    def __init__(self, target: Path, lock: Hold, overwrite: bool) -> None:
        self.out, self.folder = target, partial_of(target)
        self.path = self.folder / RESULT
        self.committed = False
        self._lock: Hold | None = lock
        self._overwrite = overwrite
        self._journal: dict[str, Any] = {}
        self._finished_before = False

    @classmethod
    def open(
        cls,
        out: str | os.PathLike[str],
        *,
        job: Mapping[str, str],
        overwrite: bool = False,
        discard_partial: bool = False,
        resume: bool = False,
        sources: Sequence[Path] = (),
        needed_bytes: int = 0,
    ) -> Self:
        """Open OUT.partial, where the same job goes on if it was there before.

        Args:
            job: all that the result depends on, part by part (name -> short text or hash).
            overwrite: an OUT that this tool wrote may be replaced.
            discard_partial: delete what was begun there, by this job or another.
            resume: refuse to begin anew.
            sources: folders and files that are read and must survive.
            needed_bytes: what will be written.

        Raises:
            SurgeryError: OUT cannot be written, or may not be; another run is writing it; there is unfinished work
                of another job. Nothing has been written or deleted then.
        """
        target = place_of(out, sources, cls.single_file)
        folder = partial_of(target)
        if resume and not folder.exists():
            raise SurgeryError(f"--resume: there is no {folder.name} to go on from; leave --resume out to begin")
        with explained(folder, needed_bytes, ELSEWHERE):
            target.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                folder.mkdir()
            stage = cls(target, cls._locked(folder, target), overwrite)
            try:
                stage._look()
                stage._check_existing()
                stage._begin(job, discard_partial, resume)
                stage._check_space(needed_bytes)
            except BaseException:
                stage.close()
                raise
        return stage

    @classmethod
    def check(
        cls,
        out: str | os.PathLike[str],
        *,
        job: Mapping[str, str] | None = None,
        overwrite: bool = False,
        discard_partial: bool = False,
        resume: bool = False,
        sources: Sequence[Path] = (),
    ) -> None:
        """Raise what `open` would raise for this place: before the work that leads there. Writes nothing.

        `job` is as much of the job as is known yet.
        """
        target = place_of(out, sources, cls.single_file)
        folder = partial_of(target)
        if not os.path.lexists(folder):
            if resume:
                raise SurgeryError(f"--resume: there is no {folder.name} to go on from; leave --resume out to begin")
            check_existing(target, overwrite, cls.single_file)
            return
        with explained(folder, then=ELSEWHERE):
            stage = cls(target, cls._locked(folder, target), overwrite)
            try:
                stage._look()
                stage._check_existing()
                old = stage._journal.get("job")
                if job is not None and old is not None and not discard_partial:
                    stage._refuse_another({name: old[name] for name in job if name in old}, job, resume)
            finally:
                stage.close()

    @classmethod
    def _locked(cls, folder: Path, target: Path) -> Hold:
        """Lock the staging folder, for as long as this process lives at most."""
        while True:
            cls._refuse_strangers(folder)  # into whose folder goes no lock of ours
            try:
                lock = hold(folder / LOCK)
            except FileNotFoundError:
                folder.mkdir(exist_ok=True)  # removed meanwhile, by a run that just ended
                continue
            if lock is None:
                raise SurgeryError(f"{target}: another run is writing it now; wait for it or stop it")
            return lock

    @classmethod
    def _refuse_strangers(cls, folder: Path) -> None:
        """Raise SurgeryError for what is in a staging folder and not ours."""
        kinds = {**KINDS, RESULT: stat.S_ISREG if cls.single_file else stat.S_ISDIR}
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.name not in kinds:
                raise SurgeryError(
                    f"{folder}: holds {path.name}, which llmsurgeon did not put there; move it away or choose another "
                    "output"
                )
            with suppress(FileNotFoundError):  # of a run that is just ending
                if not kinds[path.name](path.lstat().st_mode):
                    raise SurgeryError(f"{path}: is not what llmsurgeon put there; move {folder} away")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the lock. What was staged stays; a folder with nothing in it to go on with does not."""
        if self._lock is None:
            return
        # What went wrong before is what should be heard of.
        with suppress(OSError):
            if not self.committed and self._ours() and not self._worth():
                self._clear()
                self._leave()
        self._let_go()

    def _let_go(self) -> None:
        lock, self._lock = self._lock, None
        if lock:
            lock.end()

    def _leave(self) -> None:
        """Let go of a folder in which nothing is left, and remove it."""
        self._let_go()
        try:
            self.folder.rmdir()
        except OSError as error:  # another run may have begun there since
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                raise

    @property
    def scratch(self) -> Path:
        """A folder for intermediate results of this job: survives a kill, is gone after the commit."""
        folder = self.folder / SCRATCH
        with explained(folder):
            folder.mkdir(exist_ok=True)
        return folder

    # What is found

    def _ours(self) -> bool:
        """True for a folder that is marked, or that has nothing in it yet."""
        return MARK in self._journal or set(os.listdir(self.folder)) <= {JOURNAL_NEW, LOCK}

    def _look(self) -> None:
        """Read the journal, refuse what is not ours, finish a commit that a kill interrupted."""
        names = set(os.listdir(self.folder))
        self._refuse_strangers(self.folder)
        if JOURNAL in names:
            self._journal = _read_journal(self.folder / JOURNAL)
        elif names - {JOURNAL_NEW, LOCK}:
            raise SurgeryError(f"{self.folder}: exists and was not written by this tool; move it away or delete it")
        if "committing" in self._journal:
            self._finish_commit()

    def _worth(self) -> bool:
        """True where something is there that can be gone on with."""
        if self.single_file or "discarded" in self._journal:
            return False
        finished = any((self.path / file).is_file() for file in self._journal.get("files", {}))
        return (
            finished
            or any((self.folder / SCRATCH).glob("*/*"))
            or any(path.is_file() for path in (self.folder / SCRATCH).glob("*"))
        )

    def _begin(self, job: Mapping[str, str], discard: bool, resume: bool) -> None:
        """Go on with the same job, or begin."""
        fingerprint = fingerprint_of(job)
        if not discard and "job" in self._journal:
            self._refuse_another(self._journal["job"], job, resume)
        same = self._journal.get("fingerprint") == fingerprint and not discard and "discarded" not in self._journal
        if not same and self._journal:
            # Said first, so that a kill while clearing cannot mix two jobs.
            self._journal = {MARK: 1, "discarded": True}
            self._save_journal()
            self._clear(JOURNAL)
        if not same:
            begun = datetime.now().astimezone().isoformat(timespec="seconds")
            self._journal = {MARK: 1, "fingerprint": fingerprint, "job": dict(job), "begun": begun, "files": {}}
            self._save_journal()
        if self.single_file:
            self.path.unlink(missing_ok=True)
            return
        self.path.mkdir(exist_ok=True)
        for path in list(self.path.iterdir()):
            if path.name not in self._journal["files"]:
                remove(path)

    def _refuse_another(self, before: Mapping[str, str], now: Mapping[str, str], resume: bool) -> None:
        differ = differences(before, now)
        if not self._worth():
            if resume:
                raise SurgeryError(
                    f"--resume: nothing in {self.folder.name} can be gone on with; leave --resume out to begin"
                )
            return
        if differ:
            raise SurgeryError(
                f"{self.folder.name}: holds unfinished work that is of another job: {self.description()}. Of what was "
                f"asked for then and now, {'; '.join(differ)}. Give what it was begun with to go on with it, or pass "
                "--discard-partial to delete it and begin anew"
            )

    def description(self) -> str:
        """Whose work is staged here and how far it came, in a phrase."""
        job = self._journal.get("job", {})
        files = [path for top in (self.folder / SCRATCH, self.path) for path in top.rglob("*") if path.is_file()]
        notes = [path.read_text(errors="replace").strip() for path in sorted(files) if path.name == HOW_FAR]
        finished = len(self._journal.get("files", {}))
        facts = [
            f"`{job.get('verb', 'unknown')}` begun {_moment(self._journal.get('begun'))}",
            f"last written {_moment(max((path.stat().st_mtime for path in files), default=None))}",
            *notes,
            *([f"{finished} weight files finished"] if finished else []),
            f"{sum(path.stat().st_size for path in files):,} bytes in {len(files)} files",
        ]
        return ", ".join(facts)

    # What is written

    def _save_journal(self) -> None:
        temporary = self.folder / JOURNAL_NEW
        temporary.unlink(missing_ok=True)
        with temporary.open("x", encoding="utf-8") as file:
            json.dump(self._journal, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.folder / JOURNAL)

    def _clear(self, *but: str) -> None:
        """Delete what is ours, the mark last."""
        for name in (SCRATCH, RESULT, JOURNAL_NEW, JOURNAL):
            if name not in but:
                remove(self.folder / name)

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free + sum(
            (self.path / file).stat().st_size for file in self._journal.get("files", ()) if (self.path / file).exists()
        )
        if needed > free:
            raise SurgeryError(
                f"{self.folder.parent}: {needed:,} bytes are needed and {free:,} are free; free some space or choose "
                "another output folder"
            )

    def _check_existing(self) -> None:
        try:
            check_existing(self.out, self._overwrite, self.single_file)
        except SurgeryError as error:
            if not self._finished_before:
                raise
            raise SurgeryError(f"{error}. It is whole: the run that wrote it was killed while it tidied up") from None

    # The commit

    def _publish(self) -> None:
        """Make OUT appear, then delete what it makes superfluous. Everything staged must be on the disk."""
        with explained(self.out, then=NOTHING if self.single_file else GOES_ON):
            self._journal["committing"] = self._identity(self.path)
            self._save_journal()
            fsync(self.folder)
            self._check_existing()  # it may have appeared meanwhile
            self._swap()
            fsync(self.out.parent)
        self.committed = True
        try:
            kept = self._tidy()
            self._leave()
        except OSError as error:
            raise SurgeryError(
                f"{self.out} is written, and whole. What it makes superfluous could not be removed: "
                f"{error.filename or self.folder}: {disk_trouble(error)}"
            ) from error
        finally:
            self.close()
        if kept:
            raise SurgeryError(
                f"{self.out} is written, and whole. Files that llmsurgeon did not write had come into the one that it "
                f"replaces; they are kept in {kept}"
            )

    def _identity(self, path: Path) -> str | None:
        """What tells one result from another; None where there is none."""
        if self.single_file:
            return "there" if os.path.lexists(path) else None
        manifest = path / MANIFEST
        return file_sha256(manifest) if manifest.is_file() else None

    def _swap(self) -> None:
        if self.single_file:
            os.replace(self.path, self.out) if self._overwrite else move(self.path, self.out)
        elif not self.out.exists() or not any(self.out.iterdir()):
            os.rename(self.path, self.out)
        elif not exchange(self.path, self.out):
            replaced = self.folder / REPLACED
            os.rename(self.out, replaced)
            try:
                os.rename(self.path, self.out)
            except BaseException:
                os.rename(replaced, self.out)
                raise

    def _finish_commit(self) -> None:
        """After a kill: put everything in order, whether OUT had appeared or not."""
        wanted, replaced = self._journal["committing"], self.folder / REPLACED
        if replaced.exists() and not os.path.lexists(self.out):
            os.rename(replaced, self.out)
        there = self._identity(self.path) != wanted
        if not self.single_file:
            there = there and self._identity(self.out) == wanted
        if there:
            self._tidy()
            self._journal = {}
            self._finished_before = True
        else:
            del self._journal["committing"]
            self._save_journal()

    def _tidy(self) -> Path | None:
        """Delete scratch, the replaced OUT and the mark. Returns where files are that were in OUT and are not ours."""
        kept = None
        for old in (self.path, self.folder / REPLACED):
            if old.is_dir() and not _remove_written(old):
                kept = self.out.with_name(f"{self.out.name}.replaced-{uuid4().hex[:8]}")
                move(old, kept)
        self._clear()
        return kept


def _read_journal(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or MARK not in found:
        raise SurgeryError(
            f"{path.parent}: its {path.name} was not written by this tool, or is damaged; move the folder away or "
            "delete it"
        )
    return found


def _moment(when: str | float | None) -> str:
    """A time for people."""
    if when is None:
        return "at an unknown time"
    found = datetime.fromisoformat(when) if isinstance(when, str) else datetime.fromtimestamp(when)
    return found.strftime("%Y-%m-%d %H:%M")


def _remove_written(folder: Path) -> bool:
    """Delete the files that a folder's manifest names, and the folder; False where others are in it, which stay."""
    for name in strangers(folder).ours:
        (folder / name).unlink(missing_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    for inside in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        with suppress(OSError):
            inside.rmdir()
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def remove(path: Path) -> None:
    """Delete a file, a link or a folder of ours, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
