#!/usr/bin/env python3
"""Write docs/cli.md from the help texts; with --check, only say whether it is up to date (exit code 1 if not)."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import typer
from generated_page import write_or_check

from llmsurgeon.cli.main import app

DOCS = Path(__file__).resolve().parent.parent / "docs" / "cli.md"

HEAD = """\
# Command line

Generated from `--help` by `scripts/gen_cli_docs.py`; edit the help texts, not this page.

Every command prints its result on stdout and everything else on stderr. Exit codes: 0 done, 2 error (one message on
stderr), 3 finished but the recipe's gate was missed (the output is kept), 130 interrupted, 143
stopped by SIGTERM with its state saved.
"""


def commands(group: typer.Typer, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command and group, in the order of the help."""
    for command in group.registered_commands:
        yield (*words, command.name or command.callback.__name__.replace("_", "-"))
    for sub in group.registered_groups:
        yield (*words, sub.name)
        yield from commands(sub.typer_instance, (*words, sub.name))


def help_text(words: tuple[str, ...]) -> str:
    """What `llmsurgeon WORDS --help` prints, the same on every terminal."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        app(args=[*words, "--help"], prog_name="llmsurgeon")
    return "\n".join(line.rstrip() for line in out.getvalue().strip().splitlines())


def page() -> str:
    """The whole page."""
    os.environ["COLUMNS"] = "100"
    os.environ["TERMINAL_WIDTH"] = "100"
    parts = [HEAD]
    for words in [(), *commands(app)]:
        title = " ".join(("llmsurgeon", *words))
        parts.append(f"## {title}\n\n```\n{help_text(words)}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(write_or_check(DOCS, page(), "--help"))
