"""What processes of a crew do in tests; importable by name, as processes that are spawned need it."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from llmsurgeon.healing.distill import crew

if os.environ.get("WITHOUT_PRCTL"):  # as on a system whose kernel does not kill orphans
    crew.PR_SET_PDEATHSIG = 0


def train(folder: Path) -> None:
    """Work for ever, and save when asked to stop."""
    (folder / f"{os.getpid()}.pid").touch()
    try:
        while True:
            time.sleep(0.01)
    finally:
        (folder / f"{os.getpid()}.saved").touch()


def finish(folder: Path) -> None:
    """Be done at once."""
    (folder / f"{os.getpid()}.done").touch()


def fail(folder: Path) -> None:
    """End with an exit code of one's own."""
    sys.exit(7)


def slow_to_begin(folder: Path) -> None:
    """`train`; what is imported along takes its time."""
    train(folder)
