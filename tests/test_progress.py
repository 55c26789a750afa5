"""Progress goes to stderr in three ways: bar, lines, nothing."""

from __future__ import annotations

import pytest

from llmsurgeon import progress
from llmsurgeon.progress import Progress, set_quiet, track


@pytest.fixture(autouse=True)
def loud():
    yield
    set_quiet(False)


@pytest.fixture
def clock(monkeypatch):
    """A clock that `clock(seconds)` moves on."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_lines_every_ten_seconds_with_rate_and_estimate(clock, capsys):
    with Progress("refit", 100, "blocks") as p:
        for _ in range(100):
            clock(0.5)
            p.advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "refit: 20/100 blocks, 2 blocks/s, 0:40 left"
    assert len(lines) == 6
    assert lines[-1] == "refit: 100/100 blocks, 2 blocks/s"


def test_short_work_is_silent(clock, capsys):
    assert list(track(range(5), "read")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err == ""


def test_unknown_total(clock, capsys):
    for _ in track(iter(range(3)), "read", unit="files"):
        clock(7200)
    assert capsys.readouterr().err.splitlines()[0] == "read: 1 files, 0.000139 files/s"


def test_quiet(clock, capsys):
    set_quiet(True)
    for _ in track(range(5), "read"):
        clock(20)
    assert capsys.readouterr() == ("", "")


def test_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Progress("outer", 2) as outer:
        for _ in track(range(3), "inner"):
            pass
        outer.advance()
        assert outer._bar.tasks[0].completed == 1
    assert capsys.readouterr().out == ""
