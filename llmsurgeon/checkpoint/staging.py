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
import os
import shutil
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self
from uuid import uuid4

from llmsurgeon.checkpoint.atomic import fsync, move
from llmsurgeon.checkpoint.commit import identity, remove, remove_written, swap_folders
from llmsurgeon.checkpoint.disk import ELSEWHERE, GOES_ON, NOTHING, disk_trouble, explained
from llmsurgeon.checkpoint.journal import JOURNAL, JOURNAL_NEW, SCRATCH, Journal
from llmsurgeon.checkpoint.lock import Hold, hold
from llmsurgeon.checkpoint.out_place import check_existing, partial_of, place_of
from llmsurgeon.errors import SurgeryError

LOCK, RESULT, REPLACED = "lock", "result", "replaced"
KINDS = {
    LOCK: stat.S_ISREG,
    JOURNAL: stat.S_ISREG,
    JOURNAL_NEW: stat.S_ISREG,
    SCRATCH: stat.S_ISDIR,
    REPLACED: stat.S_ISDIR,
}


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
        self._journal = Journal(self.folder, self.path, keeps=not self.single_file)
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
                if job is not None and not discard_partial:
                    stage._journal.refuse_another(job, resume, partly=True)
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
            if not self.committed and self._ours() and not self._journal.worth():
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
        return self._journal.marked or set(os.listdir(self.folder)) <= {JOURNAL_NEW, LOCK}

    def _look(self) -> None:
        """Read the journal, refuse what is not ours, finish a commit that a kill interrupted."""
        names = set(os.listdir(self.folder))
        self._refuse_strangers(self.folder)
        if JOURNAL in names:
            self._journal.read()
        elif names - {JOURNAL_NEW, LOCK}:
            raise SurgeryError(f"{self.folder}: exists and was not written by this tool; move it away or delete it")
        if "committing" in self._journal.values:
            self._finish_commit()

    def _begin(self, job: Mapping[str, str], discard: bool, resume: bool) -> None:
        """Go on with the same job, or begin."""
        if not discard:
            self._journal.refuse_another(job, resume)
        if discard or not self._journal.of(job):
            if self._journal.marked:
                self._journal.discard()
                self._clear(JOURNAL)
            self._journal.begin(job)
        if self.single_file:
            self.path.unlink(missing_ok=True)
            return
        self.path.mkdir(exist_ok=True)
        for path in list(self.path.iterdir()):
            if path.name not in self._journal.files:
                remove(path)

    # What is written

    def _clear(self, *but: str) -> None:
        """Delete what is ours, the mark last."""
        for name in (SCRATCH, RESULT, JOURNAL_NEW, JOURNAL):
            if name not in but:
                remove(self.folder / name)

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free + sum(
            (self.path / file).stat().st_size for file in self._journal.files if (self.path / file).exists()
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
            self._journal.values["committing"] = identity(self.path, self.single_file)
            self._journal.save()
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

    def _swap(self) -> None:
        if not self.single_file:
            swap_folders(self.path, self.out, aside=self.folder / REPLACED)
        elif self._overwrite:
            os.replace(self.path, self.out)
        else:
            move(self.path, self.out)

    def _finish_commit(self) -> None:
        """After a kill: put everything in order, whether OUT had appeared or not."""
        wanted, replaced = self._journal.values["committing"], self.folder / REPLACED
        if replaced.exists() and not os.path.lexists(self.out):
            os.rename(replaced, self.out)
        there = identity(self.path, self.single_file) != wanted
        if not self.single_file:
            there = there and identity(self.out, self.single_file) == wanted
        if there:
            self._tidy()
            self._journal.values = {}
            self._finished_before = True
        else:
            del self._journal.values["committing"]
            self._journal.save()

    def _tidy(self) -> Path | None:
        """Delete scratch, the replaced OUT and the mark. Returns where files are that were in OUT and are not ours."""
        kept = None
        for old in (self.path, self.folder / REPLACED):
            if old.is_dir() and not remove_written(old):
                kept = self.out.with_name(f"{self.out.name}.replaced-{uuid4().hex[:8]}")
                move(old, kept)
        self._clear()
        return kept
