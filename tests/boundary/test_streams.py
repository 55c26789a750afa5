"""What a library prints by itself is no result."""

from __future__ import annotations

import ctypes
import os

from llmsurgeon.boundary.streams import stdout_kept_clean


def test_what_c_prints_goes_to_stderr(capfd):
    c = ctypes.CDLL(None)
    print("before")
    with stdout_kept_clean():
        c.puts(b"a library's remark")
        os.write(1, b"and another")
    print("after")
    out, err = capfd.readouterr()
    assert out == "before\nafter\n" and "a library's remark" in err and "and another" in err


def test_an_error_leaves_stdout_as_it_was(capfd):
    try:
        with stdout_kept_clean():
            raise KeyError
    except KeyError:
        print("still here")
    assert capfd.readouterr().out == "still here\n"
