"""The command line: parse, call, print. Importing it must stay fast, so heavy imports live inside functions."""

from __future__ import annotations

import sys


class Output:
    """What the global options say about printing; set once, before a command runs."""

    quiet: bool = False


output = Output()


def say(message: str) -> None:
    """Progress and remarks for people, on stderr so that stdout stays clean; nothing under --quiet."""
    if not output.quiet:
        print(message, file=sys.stderr, flush=True)
