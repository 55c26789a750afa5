"""The command line: parse, call, print. Importing it must stay fast, so heavy imports live inside functions."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

OFF_TERMINAL_COLUMNS = 160


class Output:
    """What the global options say about printing; set once, before a command runs."""

    quiet: bool = False


output = Output()


def console() -> Console:
    """Where results for people go: as wide as the terminal, and wide enough for every table where there is none."""
    from rich.console import Console

    fitting = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if fitting else OFF_TERMINAL_COLUMNS)


def say(message: str) -> None:
    """Progress and remarks for people, on stderr so that stdout stays clean; nothing under --quiet."""
    if not output.quiet:
        print(message, file=sys.stderr, flush=True)
