"""The command line: parse, call, print. Importing it must stay fast, so heavy imports live inside functions."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from llmsurgeon.boundary.foreign import printable

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
    from rich.text import Text

    class Plain(Console):
        """Takes every text for what it is: names of models and tensors are a stranger's, and hold no markup."""

        def render_str(self, text: str, **how: Any) -> Text:
            return super().render_str(printable(text), **{**how, "markup": False, "emoji": False})

    fitting = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Plain(width=None if fitting else OFF_TERMINAL_COLUMNS)


def tell(line: object, end: str = "\n") -> None:
    """A result for people, on stdout: no terminal obeys what is in it."""
    print(printable(str(line)), end=end)


def say(message: str) -> None:
    """Progress and remarks for people, on stderr so that stdout stays clean; nothing under --quiet."""
    if not output.quiet:
        print(printable(message), file=sys.stderr, flush=True)
