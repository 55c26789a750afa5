"""A lock has one holder, and is free when that process has ended, whatever it forked."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest
from filelock import FileLock

from llmsurgeon.checkpoint.lock import NO_LOCKS, hold
from llmsurgeon.checkpoint.staging import Staging
from llmsurgeon.errors import SurgeryError


def test_one_holder_in_one_process_and_between_processes(tmp_path, helpers):
    mine = hold(tmp_path / "lock")
    assert mine is not None and hold(tmp_path / "lock") is None

    def work():
        assert hold(tmp_path / "lock") is None

    assert helpers.in_child(work) == (0, "")
    mine.release()
    assert (tmp_path / "lock").exists()
    again = hold(tmp_path / "lock")
    assert again is not None
    again.end()
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_keeps_what_is_in_it_and_is_no_lock_by_itself(tmp_path):
    (tmp_path / "lock").write_text("left by a kill")
    mine = hold(tmp_path / "lock")
    assert mine is not None
    mine.release()
    assert (tmp_path / "lock").exists()


# A run that forks a worker, which says its number, and is killed.
RUN = """
import os, signal, sys, time
from pathlib import Path
from llmsurgeon.checkpoint.lock import hold
mine = hold(Path(sys.argv[1]))
assert mine is not None
number, worker = Path(sys.argv[2]), os.fork()
if worker == 0:
    number.with_suffix(".new").write_text(str(os.getpid()))
    number.with_suffix(".new").rename(number)
    time.sleep(60)
    os._exit(0)
while not number.exists():
    time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_lock_dies_with_its_process_though_a_worker_that_it_forked_lives_on(tmp_path):
    lock, number = tmp_path / "lock", tmp_path / "worker"
    ended = subprocess.run([sys.executable, "-c", RUN, lock, number], stderr=subprocess.DEVNULL)
    assert ended.returncode == -signal.SIGKILL
    worker = int(number.read_text())
    try:
        os.kill(worker, 0)  # it lives
        assert hold(lock) is not None
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_forked_worker_that_ends_takes_no_lock_along(tmp_path):
    mine = hold(tmp_path / "lock")
    assert mine is not None
    worker = os.fork()
    if worker == 0:
        mine.end()
        os._exit(0)
    assert os.waitpid(worker, 0)[1] == 0
    assert (tmp_path / "lock").exists() and hold(tmp_path / "lock") is None
    mine.end()


@pytest.mark.parametrize("code", NO_LOCKS)
def test_where_there_are_no_locks_the_work_goes_on(tmp_path, monkeypatch, code):
    def acquire(lock, **how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(FileLock, "acquire", acquire)
    mine = hold(tmp_path / "lock")
    assert mine is not None
    mine.end()
    with Staging.open(tmp_path / "out", job={"all": "x"}) as stage:
        assert stage.path.is_dir()
    assert not list(tmp_path.iterdir())


def test_other_trouble_is_told(tmp_path, monkeypatch):
    def acquire(lock, **how):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with pytest.raises(SurgeryError, match="Input/output error"):
        Staging.open(tmp_path / "out", job={"all": "x"})


def test_a_lock_in_a_folder_that_is_gone_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        hold(tmp_path / "gone" / "lock")


def test_no_lock_goes_into_a_folder_of_somebody_elses(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    before = (tmp_path / "out.partial").stat().st_mtime_ns
    for act in (Staging.check, Staging.open):
        with pytest.raises(SurgeryError, match=r"holds thesis\.txt"):
            act(tmp_path / "out", job={"all": "x"})
    assert (tmp_path / "out.partial").stat().st_mtime_ns == before
