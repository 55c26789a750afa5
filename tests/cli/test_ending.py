"""How the command ends: asked to stop while it imports and works, and with streams that nobody reads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from conftest import save_tiny

ROOT = Path(__file__).parents[2]
# The signal comes with the N-th import, however long that takes on this machine.
SCRIPT = """
import os, sys
from llmsurgeon import __main__ as entry

place, number, left = sys.argv.pop(1), int(sys.argv.pop(1)), int(sys.argv.pop(1))

def hook(event, arguments):
    global left
    if event == place:
        left -= 1
        if left == 0:
            os.kill(os.getpid(), number)

sys.addaudithook(hook)
entry.main()
"""


def command(*arguments: str, script: str | None = None, **options) -> subprocess.Popen[str]:
    start = ["-c", script] if script else ["-m", "llmsurgeon"]
    return subprocess.Popen(
        [sys.executable, *start, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options},
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), "llama", tokenizer=True)


@pytest.mark.parametrize("count", [1, 40, 300, 900, 1500])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_importing(model, tmp_path, number, count):
    arguments = ("prune", str(model), "--blocks", "2", "--no-refit", "-o", str(tmp_path / "out"))
    process = command("import", str(int(number)), str(count), *arguments, script=SCRIPT)
    out, err = process.communicate(timeout=300)
    word = "interrupted" if number == signal.SIGINT else "stopped by SIGTERM"
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number], err
    assert err.startswith(f"error: {word}; ") and err.count("\n") == 1 and out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_writing(model, tmp_path, number):
    arguments = ("--quiet", "prune", str(model), "--blocks", "2", "--no-refit", "-o", str(tmp_path / "out"))
    process = warm.start(SCRIPT, "os.truncate", int(number), 1, *arguments)
    _, err = process.communicate(timeout=300)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number], err
    assert err.startswith("error: ") and err.count("\n") == 1 and list(tmp_path.iterdir()) == []


SWALLOWED = """
import os, sys, time
from llmsurgeon.cli import main
from llmsurgeon import __main__ as entry

class Careless:
    def __del__(self):
        os.kill(os.getpid(), int(sys.argv[1]))
        time.sleep(0)

def work():
    Careless()  # what a destructor raises is printed by Python, and forgotten
    time.sleep(60)

main.main = work
entry.main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_a_signal_that_a_destructor_swallows(number):
    process = command(str(int(number)), script=SWALLOWED)
    out, err = process.communicate(timeout=50)
    assert process.returncode == 143 and out == "" and "Exception ignored" not in err


def test_a_reader_that_leaves_stops_no_work(model, tmp_path):
    """As `| head -1` does: what is printed goes nowhere, OUT is written."""
    reader, writer = os.pipe()
    os.close(reader)
    arguments = ("prune", str(model), "--blocks", "2", "--no-refit", "-o", str(tmp_path / "out"))
    process = command(*arguments, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0 and err == "" and (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_closed_descriptors(model, tmp_path, closed, run):
    """The weights must not be opened as descriptor 1 or 2, where everything is printed."""
    arguments = ("prune", str(model), "--blocks", "2", "--no-refit", "-o", str(tmp_path / "out"))
    close = " ".join(f"{fd}>&-" for fd in closed)
    script = f'exec "$0" -m llmsurgeon "$@" {close}'
    done = subprocess.run(
        ["bash", "-c", script, sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "error" not in done.stderr
    code, said, _ = run("verify", tmp_path / "out")
    assert said.startswith(str(tmp_path / "out")) and code == 0


def test_a_full_disk_under_stdout_is_said():
    with open("/dev/full", "w") as full:
        process = command("recipes", "ls", stdout=full)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err == "error: stdout cannot be written: No space left on device; what was to be printed is lost\n"
