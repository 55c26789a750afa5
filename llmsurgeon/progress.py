"""Progress of long work, on stderr: a bar with rate and estimate on a terminal, plain lines otherwise; and remarks.

Nothing is shown after `set_quiet(True)`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

from llmsurgeon.boundary.foreign import printable

T = TypeVar("T")
Say = Callable[[str], None]

LINE_SECONDS = 10.0  # between two plain lines, where stderr is a file or a pipe
_quiet = False
_said: set[str] = set()


def set_quiet(quiet: bool) -> None:
    """Switch progress output off (or on again) for the whole process."""
    global _quiet
    _quiet = quiet


def silent(line: str) -> None:
    """What a verb says its remarks to where nobody listens."""


def remark(line: str) -> None:
    """Say something that the reader should know on stderr, once in a process; nothing where quiet is set."""
    if line not in _said:
        _said.add(line)
        if not _quiet:
            print(f"note: {printable(line)}", file=sys.stderr, flush=True)


def track(iterable: Iterable[T], description: str, total: float | None = None, unit: str = "steps") -> Iterator[T]:
    """Yield from `iterable`, showing how far it is. `total` defaults to its length where it has one."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with Progress(description, total, unit) as progress:
        for item in iterable:
            yield item
            progress.advance()


class Progress:
    """Counts up to `total` units (None: unknown): `with Progress("refit", 22, "blocks") as p: p.advance()`."""

    def __init__(self, description: str, total: float | None = None, unit: str = "steps") -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done = 0.0
        self.note = ""
        self._bar: Any = None

    def __enter__(self) -> Progress:
        self._start = self._last_line = time.monotonic()
        if not _quiet and sys.stderr.isatty():
            self._bar = _rich_bar(self.unit)
            self._bar.start()
            self._task = self._bar.add_task(self.description, total=self.total, note=self.note)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._last_line > self._start:  # short work stays silent
            self._line()

    def advance(self, n: float = 1) -> None:
        """Count `n` more units as done."""
        self.reach(self.done + n)

    def reach(self, done: float, total: float | None = None, note: str | None = None) -> None:
        """Say how many units are done, of how many where that has changed; `note` is shown behind them."""
        self.done = done
        self.total = self.total if total is None else total
        self.note = self.note if note is None else note
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, total=self.total, note=self.note)
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            self._line()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the terminal to other progress meanwhile."""
        if self._bar is not None:
            self._bar.stop()
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.start()

    def _line(self) -> None:
        if _quiet:
            return
        rate = self.done / max(time.monotonic() - self._start, 1e-9)
        line = f"{self.description}: {self.done:,.0f}"
        line += f"/{self.total:,.0f} {self.unit}" if self.total else f" {self.unit}"
        line += f", {_number(rate)} {self.unit}/s"
        if self.total and 0 < self.done < self.total:
            line += f", {_clock((self.total - self.done) / rate)} left"
        line += f", {self.note}" if self.note else ""
        print(printable(line), file=sys.stderr, flush=True)


def _rich_bar(unit: str) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{_number(speed)} {unit}/s" if speed else "")

    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,  # stdout belongs to the report
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def spoken(seconds: float) -> str:
    """About how long something takes, in words."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} seconds" if seconds >= 1.5 else "a second"
    return f"{seconds / 60:.0f} minutes"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
