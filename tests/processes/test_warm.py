"""Processes with a head start are what Popen would have started."""

from __future__ import annotations

import os
import signal

import pytest
import warm

SPAWNING = """
import multiprocessing, os
process = multiprocessing.get_context("spawn").Process(target=os.system, args=("pwd",))
process.start()
process.join()
"""


def test_what_it_is_given_and_what_it_says(tmp_path):
    script = "import os, sys; print(sys.argv, input(), os.getcwd(), os.environ['OWN']); print('x', file=sys.stderr)"
    process = warm.start(script, "a", 1, env={**os.environ, "OWN": "1"}, cwd=tmp_path, stdin="typed\n")
    assert process.communicate() == (f"['-c', 'a', '1'] typed {tmp_path} 1\n", "x\n") and process.returncode == 0


@pytest.mark.parametrize(("script", "code", "out", "err"), [
    ("import sys; sys.exit(7)", 7, "", ""),
    ("import atexit; atexit.register(print, 'bye'); raise SystemExit('text')", 1, "bye\n", "text\n"),
    ("1 / 0", 1, "", "ZeroDivisionError: division by zero\n"),
])  # fmt: skip
def test_how_it_ends(script, code, out, err):
    process = warm.start(script)
    said = process.communicate()
    assert process.returncode == process.poll() == code and said[0] == out and said[1].endswith(err)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_signals_reach_it_and_its_group(number):
    process = warm.start("import time; time.sleep(60)", new_session=True)
    assert process.poll() is None and os.getpgid(process.pid) == process.pid
    with pytest.raises(TimeoutError):
        process.wait(0.01)
    os.killpg(process.pid, number)
    assert process.communicate(timeout=60) == ("", "") and process.returncode == -number


def test_processes_that_it_spawns_begin_in_its_folder(tmp_path):
    assert warm.start(SPAWNING, cwd=tmp_path).communicate() == (f"{tmp_path}\n", "")
