"""job.json of a staging folder: whose work it is, since when, and which of its files are finished."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from llmsurgeon.checkpoint.job import differences, fingerprint_of
from llmsurgeon.errors import SurgeryError

JOURNAL, JOURNAL_NEW, SCRATCH = "job.json", "job.json.new", "scratch"
MARK = "llmsurgeon staging"  # a key of job.json
HOW_FAR = "how-far.txt"  # what a job may write into its scratch, for people: a line


class Journal:
    """The journal of the staging folder `folder`, whose result is to be `result`.

    keeps: whether finished files of the result can be gone on with.
    """

    def __init__(self, folder: Path, result: Path, keeps: bool) -> None:
        self.folder, self.result, self.keeps = folder, result, keeps
        self.values: dict[str, Any] = {}

    def read(self) -> None:
        """Take over what the folder's job.json says.

        Raises:
            SurgeryError: it was not written by this tool, or is damaged.
        """
        path = self.folder / JOURNAL
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if not isinstance(found, dict) or MARK not in found:
            raise SurgeryError(
                f"{path.parent}: its {path.name} was not written by this tool, or is damaged; move the folder away or "
                "delete it"
            )
        self.values = found

    def save(self) -> None:
        """Write it, whole or not at all."""
        temporary = self.folder / JOURNAL_NEW
        temporary.unlink(missing_ok=True)
        with temporary.open("x", encoding="utf-8") as file:
            json.dump(self.values, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.folder / JOURNAL)

    @property
    def marked(self) -> bool:
        """Whether it says that the folder is this tool's."""
        return MARK in self.values

    @property
    def files(self) -> dict[str, Any]:
        """What is known of each finished file of the result."""
        found: dict[str, Any] = self.values["files"]
        return found

    def of(self, job: Mapping[str, str]) -> bool:
        """Whether it is of this very job, and nothing of it is being deleted."""
        return self.values.get("fingerprint") == fingerprint_of(job) and "discarded" not in self.values

    def begin(self, job: Mapping[str, str]) -> None:
        """Write that this job begins."""
        begun = datetime.now().astimezone().isoformat(timespec="seconds")
        self.values = {MARK: 1, "fingerprint": fingerprint_of(job), "job": dict(job), "begun": begun, "files": {}}
        self.save()

    def discard(self) -> None:
        """Write that all is being deleted: said first, so that a kill meanwhile cannot mix two jobs."""
        self.values = {MARK: 1, "discarded": True}
        self.save()

    def worth(self) -> bool:
        """True where something is there that can be gone on with."""
        if not self.keeps or "discarded" in self.values:
            return False
        finished = any((self.result / file).is_file() for file in self.values.get("files", {}))
        return (
            finished
            or any((self.folder / SCRATCH).glob("*/*"))
            or any(path.is_file() for path in (self.folder / SCRATCH).glob("*"))
        )

    def refuse_another(self, now: Mapping[str, str], resume: bool, partly: bool = False) -> None:
        """Raise SurgeryError for unfinished work of another job than `now`, or for none where `resume` wants some.

        `partly`: `now` is as much of the job as is known yet.
        """
        if "job" not in self.values:
            return
        before = self.values["job"]
        if partly:
            before = {name: before[name] for name in now if name in before}
        differ = differences(before, now)
        if not self.worth():
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
        job = self.values.get("job", {})
        files = [path for top in (self.folder / SCRATCH, self.result) for path in top.rglob("*") if path.is_file()]
        notes = [path.read_text(errors="replace").strip() for path in sorted(files) if path.name == HOW_FAR]
        finished = len(self.values.get("files", {}))
        facts = [
            f"`{job.get('verb', 'unknown')}` begun {_moment(self.values.get('begun'))}",
            f"last written {_moment(max((path.stat().st_mtime for path in files), default=None))}",
            *notes,
            *([f"{finished} weight files finished"] if finished else []),
            f"{sum(path.stat().st_size for path in files):,} bytes in {len(files)} files",
        ]
        return ", ".join(facts)


def _moment(when: str | float | None) -> str:
    """A time for people."""
    if when is None:
        return "at an unknown time"
    found = datetime.fromisoformat(when) if isinstance(when, str) else datetime.fromtimestamp(when)
    return found.strftime("%Y-%m-%d %H:%M")
