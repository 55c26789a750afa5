"""What libraries of C and C++ write to the process's own stdout, where results stand."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def stdout_kept_clean() -> Iterator[None]:
    """Whatever is written to descriptor 1 meanwhile goes to stderr: a result, JSON say, holds nothing else.

    For work of this process that itself prints nothing.
    """
    _flush()
    try:
        saved = os.dup(1)
    except OSError:  # closed: nobody reads it
        yield
        return
    try:
        with suppress(OSError):
            os.dup2(2, 1)
        yield
    finally:
        _flush()
        os.dup2(saved, 1)
        os.close(saved)


def _flush() -> None:
    """What Python and C have not written yet, they write now."""
    if sys.stdout is not None:  # as a program without a console has it
        sys.stdout.flush()
    with suppress(OSError, AttributeError, TypeError):  # where C's library cannot be asked, as on Windows
        ctypes.CDLL(None).fflush(None)
