"""Files kept for a later run are believed only where they are what was written, and a full disk is one message."""

from __future__ import annotations

import errno
import os
import resource
import signal

import pytest
import torch
from safetensors.torch import save_file

from llmsurgeon.checkpoint.kept import LOCK, SUM, allocate, forget, keep, kept, unfinished, writing
from llmsurgeon.checkpoint.lock import hold
from llmsurgeon.errors import SurgeryError


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "kept"
    keep(path, lambda partial: partial.write_bytes(b"0123456789" * 100))
    return path


def flip(path):
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "cut short": lambda path: os.truncate(path, 500),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "a bit": flip,
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "no sum": lambda path: path.with_name(path.name + SUM).unlink(),
    "no sum in it": lambda path: path.with_name(path.name + SUM).write_text("{}"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


def test_what_was_written_is_believed(file, capsys):
    assert kept(file) and kept(file) and not kept(file.with_name("other"))
    assert sorted(path.name for path in file.parent.iterdir()) == ["kept", "kept.sum"]
    forget(file)
    assert not kept(file) and not list(file.parent.iterdir()) and capsys.readouterr().err == ""


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "a folder"])
def test_what_is_damaged_is_removed_with_a_line(file, damage, capsys):
    DAMAGES[damage](file)
    assert not kept(file)
    assert capsys.readouterr().err.startswith(f"note: {file}: is damaged") and not file.exists()


def test_a_write_that_fails_leaves_what_was_there(file):
    def fail(partial):
        partial.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(SurgeryError, match=r"kept: cannot be written: the disk is full; free some space"):
        keep(file, fail)
    assert kept(file) and len(list(file.parent.iterdir())) == 2


@pytest.mark.parametrize("write", [
    lambda path: save_file({"a": torch.zeros(100_000)}, path),
    lambda path: torch.save({"a": torch.zeros(100_000)}, path),
    lambda path: path.write_bytes(bytes(400_000)),
], ids=["safetensors", "torch", "python"])  # fmt: skip
def test_every_library_says_the_same_of_a_disk_without_room(tmp_path, helpers, write):
    """The system's limit on the size of a file stands for a full disk."""

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        with writing(tmp_path / "place", then="make room"):
            write(tmp_path / "file")

    status, said = helpers.in_child(work)
    assert status != 0 and said.startswith("SurgeryError")
    assert "place: cannot be written: " in said and said.rstrip().endswith("; make room")


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="sizes differ"), writing(tmp_path):
        raise RuntimeError("sizes differ")


@pytest.mark.parametrize("without", [None, errno.EOPNOTSUPP])
def test_room_is_made_before_a_file_is_mapped(tmp_path, monkeypatch, without):
    if without:

        def refuse(*args):
            raise OSError(without, "no such call here")

        monkeypatch.setattr(os, "posix_fallocate", refuse)
    with (tmp_path / "file").open("w+b") as file:
        allocate(file.fileno(), 3_000_001)
        found = os.fstat(file.fileno())
    assert found.st_size == 3_000_001 and found.st_blocks * 512 >= found.st_size, "not a hole"


def test_no_room_is_an_error(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with (tmp_path / "file").open("w+b") as file, pytest.raises(OSError, match="No space left"):
        allocate(file.fileno(), 100)


def test_what_a_killed_process_left_unfinished_is_removed_and_nothing_else(tmp_path, helpers):
    path = tmp_path / "cache.u32"
    others = [tmp_path / name for name in ("cache.u32.backup", "cache.u32x.123", "cache.u32.12a", "other.u32.123")]
    for other in others:
        other.write_text("mine")

    def killed(partial):
        partial.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    status, _ = helpers.in_child(lambda: keep(path, killed))
    assert os.WTERMSIG(status) == signal.SIGKILL
    left = set(tmp_path.iterdir()) - set(others)
    assert sorted(file.read_bytes() for file in left) == [b"", b"half"]  # the lock, and what was written
    with unfinished(path) as mine:
        assert not any(file.exists() for file in left) and mine.exists()
        mine.write_bytes(b"being written")
        status, said = helpers.in_child(lambda: keep(path, lambda partial: partial.write_bytes(b"whole")))
        assert status == 0, said
        assert mine.read_bytes() == b"being written"  # somebody is at it
    assert path.read_bytes() == b"whole" and kept(path)
    assert set(tmp_path.iterdir()) == {*others, path, tmp_path / "cache.u32.sum"}


def test_a_lock_whose_file_had_just_got_its_name_goes_when_the_file_is_read(file):
    beside = file.with_name(f"{file.name}.999999{LOCK}")
    beside.touch()  # of a process that was killed before it removed it
    held = hold(file.with_name(f"{file.name}.999998{LOCK}"))  # of one that writes the file anew
    assert kept(file)
    assert not beside.exists() and file.with_name(f"{file.name}.999998{LOCK}").exists()
    held.end()
