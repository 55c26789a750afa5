"""Temporary folders of processes that were killed."""

from __future__ import annotations

import os
import signal
import tempfile

import pytest

from llmsurgeon.checkpoint.passing import MARK, passing, passing_folder


class Owner:
    pass


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_folder_goes_with_its_owner_and_is_left_alone_until_then(place):
    owner, other = Owner(), Owner()
    mine, theirs = passing_folder(owner), passing_folder(other)
    assert not list(mine.iterdir())
    (mine / "a").touch()
    assert theirs.exists()
    del owner
    assert not mine.exists() and theirs.exists()
    del other
    assert not list(place.iterdir())


def test_what_a_killed_process_left_is_removed_and_nothing_else(place, helpers):
    for name in ("llmsurgeon-passing-notes", "other"):
        (place / name).mkdir()
        (place / name / "thesis.txt").write_text("mine")
    (place / "llmsurgeon-passing-link").symlink_to(place / "other")
    before = set(place.iterdir())

    def work():
        owner = Owner()
        (passing_folder(owner) / "tokenizer.json").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    status, _ = helpers.in_child(work)
    assert os.WTERMSIG(status) == signal.SIGKILL
    (left,) = set(place.iterdir()) - before
    assert (left / MARK).exists()
    (place / "llmsurgeon-passing-12345678").mkdir()  # killed before the mark was there
    owner = Owner()
    made = passing_folder(owner)
    assert set(place.iterdir()) == {*before, made.parent}
    assert (place / "llmsurgeon-passing-notes" / "thesis.txt").exists() and (place / "other" / "thesis.txt").exists()


def test_for_a_while(place):
    with passing() as folder:
        (folder / "a").touch()
        assert folder.parent.parent == place
    assert not list(place.iterdir())
    with pytest.raises(ValueError), passing() as folder:
        (folder / "a").touch()
        raise ValueError
    assert not list(place.iterdir())
