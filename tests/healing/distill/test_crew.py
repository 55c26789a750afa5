"""Processes that train: they stop when asked, wherever they are, and none outlives the one that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import crew_targets
import pytest

from llmsurgeon.healing.distill.crew import STOPPED, Crew

ROOT = Path(crew_targets.__file__).parents[1]
SCRIPT = """
import os, signal, sys
from pathlib import Path
import crew_targets
from llmsurgeon.healing.distill.crew import Crew

folder, interrupt_start = Path(sys.argv[1]), int(sys.argv[2])
ended = []
if interrupt_start:
    real = Crew.start

    def start(crew, *what):
        begin = crew._context.Process.start

        def begin_and_be_asked(process):
            begin(process)  # the child is there, and has hardly begun
            os.kill(os.getpid(), interrupt_start)

        crew._context.Process.start = begin_and_be_asked
        real(crew, *what)

    Crew.start = start
with Crew() as crew:
    for _ in range(2):
        if not crew.asked:
            crew.start(crew_targets.train, folder)
    print("started", flush=True)
    while crew.running:
        ended += [code for _, code in crew.wait()]
print(ended, int(crew.asked), flush=True)
"""


def parent(folder: Path, interrupt_start: int = 0, **environment: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), str(interrupt_start)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def working(folder: Path, count: int = 2) -> list[int]:
    """The process ids of the children, once they are at work."""
    until = time.monotonic() + 120
    while len(found := list(folder.glob("*.pid"))) < count:
        assert time.monotonic() < until
        time.sleep(0.02)
    return [int(path.stem) for path in found]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("environment", [{}, {"WITHOUT_PRCTL": "1"}])
def test_they_end_with_a_parent_that_is_killed(tmp_path, environment):
    process = parent(tmp_path, **environment)
    pids = working(tmp_path)
    process.kill()
    process.communicate()
    until = time.monotonic() + 20
    while any(map(alive, pids)):
        assert time.monotonic() < until, "they train on"
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "to_all"), [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGINT, True)])
def test_a_signal_reaches_them_and_nothing_but_the_result_is_printed(tmp_path, number, to_all):
    process = parent(tmp_path)
    working(tmp_path)
    # A terminal's Ctrl-C goes to every process of the group.
    os.killpg(process.pid, number) if to_all else process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert err == "" and out == f"started\n[{STOPPED}, {STOPPED}] {int(number)}\n"
    assert len(list(tmp_path.glob("*.saved"))) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_they_start(tmp_path, number):
    process = parent(tmp_path, int(number))
    out, err = process.communicate(timeout=120)
    assert err == "" and out == f"started\n[{STOPPED}] {int(number)}\n"


def test_codes_and_a_failure_takes_the_others_along(tmp_path):
    with Crew() as crew:
        crew.start(crew_targets.finish, tmp_path)
        ((job, code),) = crew.wait()
        assert (job, code) == (tmp_path, 0) and list(tmp_path.glob("*.done"))
        crew.start(crew_targets.fail, tmp_path)
        assert crew.wait() == [(tmp_path, 7)]
    with pytest.raises(RuntimeError), Crew() as crew:
        crew.start(crew_targets.train, tmp_path)
        (pid,) = working(tmp_path, 1)
        raise RuntimeError
    assert not alive(pid)


@pytest.fixture
def interruptible():
    """Whoever runs the tests may have had SIGINT ignored, as a shell's background jobs have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_without_processes_a_signal_does_what_it_always_does():
    with pytest.raises(KeyboardInterrupt), Crew() as crew:
        signal.raise_signal(signal.SIGINT)
    assert not crew.asked
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


LAUNCHED = """
import sys, time
from pathlib import Path
from llmsurgeon.processes.world import stop_with_launcher

stop_with_launcher(0.02)
Path(sys.argv[1]).touch()
time.sleep(120)
"""
LAUNCHER = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', *sys.argv[1:]]).wait()"


@pytest.mark.parametrize("elastic", [True, False])
def test_a_worker_stops_when_its_launcher_is_gone(tmp_path, elastic):
    """Of torchrun or accelerate launch; one that somebody started by hand works on."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TORCHELASTIC_RUN_ID", None)
    if elastic:
        environment["TORCHELASTIC_RUN_ID"] = "none"
    ready = tmp_path / "ready"
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, LAUNCHED, str(ready)], env=environment, start_new_session=True
    )
    until = time.monotonic() + 120
    while not ready.exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    launcher.kill()
    launcher.wait()
    until = time.monotonic() + (20 if elastic else 1)
    while (left := members(launcher.pid)) and time.monotonic() < until:
        time.sleep(0.02)
    if not elastic:
        assert left
        os.killpg(launcher.pid, signal.SIGKILL)
    else:
        assert not left


def members(group: int) -> list[int]:
    """The processes of a group that are not dead."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] not in "ZX":
            found.append(int(path.parent.name))
    return found
