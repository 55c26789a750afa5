"""What staging refuses, keeps and deletes: unfinished work, files of others, places where nothing can be."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmsurgeon.checkpoint.atomic import exchange, move, write_whole
from llmsurgeon.checkpoint.checksums import CHECKSUMS, file_sum
from llmsurgeon.checkpoint.commit import remove
from llmsurgeon.checkpoint.journal import HOW_FAR
from llmsurgeon.checkpoint.manifest import strangers, verify_files
from llmsurgeon.checkpoint.writer import FileStage, Stage
from llmsurgeon.errors import SurgeryError

JOB = {"verb": "heal", "model": "a" * 64, "distill.learning_rate": "0.001", "dtype": "float32"}
OTHER = {**JOB, "distill.learning_rate": "0.002"}


def tree(folder: Path) -> dict[str, bytes | str]:
    """Everything below a folder."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        found[name] = (
            f"-> {path.readlink()}" if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
        )
    return found


def begun(out: Path, job: dict[str, str] = JOB) -> Path:
    """An OUT.partial with hours of work in it."""
    with Stage.open(out, job=job) as stage:
        store = stage.scratch / "distill-0"
        store.mkdir()
        (store / "state").write_text("hours of training")
        (store / HOW_FAR).write_text("distill: step 1200 of 4000\n")
    return out.with_name(f"{out.name}.partial")


def finished(out: Path, checksum: str = "blake3", value: float = 1, **options) -> Path:
    with Stage.open(out, job=JOB, **options) as stage:
        stage.write_weights({"a": torch.full((2,), float(value))}, checksum=checksum)
        stage.write_file("config.json", "{}")
        return stage.commit()


# Unfinished work


@pytest.mark.parametrize("early", [True, False])
def test_work_of_another_job_stays_and_the_message_says_what_it_is(tmp_path, early):
    partial = begun(tmp_path / "out")
    before = tree(tmp_path)
    with pytest.raises(SurgeryError) as raised:
        if early:  # as much as is known before the models are measured
            Stage.check(tmp_path / "out", job={"verb": "heal", "distill.learning_rate": "0.002"})
        else:
            Stage.open(tmp_path / "out", job=OTHER)
    said = str(raised.value)
    for part in (
        "out.partial: holds unfinished work that is of another job: `heal` begun 20",
        "distill: step 1200 of 4000",
        "last written 20",
        "distill.learning_rate is 0.002 and was 0.001",
        "pass --discard-partial to delete it and begin anew",
    ):
        assert part in said, said
    assert tree(tmp_path) == before and "dtype" not in said
    with Stage.open(tmp_path / "out", job=JOB) as stage:  # what it was begun with goes on
        assert (stage.scratch / "distill-0" / "state").read_text() == "hours of training"
    with Stage.open(tmp_path / "out", job=OTHER, discard_partial=True) as stage:
        assert not any(stage.scratch.iterdir())
    assert not partial.exists()


def test_the_flag_begins_the_same_job_anew(tmp_path):
    begun(tmp_path / "out")
    with Stage.open(tmp_path / "out", job=JOB, discard_partial=True) as stage:
        assert not any(stage.scratch.iterdir())


def test_what_cannot_be_gone_on_with_needs_no_flag(tmp_path):
    with Stage.open(tmp_path / "out", job=JOB) as stage:
        (stage.scratch / "distill-0").mkdir()
        stage.write_file("config.json", "{}")
        stage._lock.release()  # as a kill would leave it
        stage._lock = None
    assert (tmp_path / "out.partial").exists()
    with Stage.open(tmp_path / "out", job=OTHER) as stage:
        assert not list(stage.path.iterdir())
    assert not (tmp_path / "out.partial").exists()


def test_resume_insists_on_going_on(tmp_path):
    for act in (Stage.check, Stage.open):
        with pytest.raises(SurgeryError, match=r"there is no out\.partial to go on from"):
            act(tmp_path / "out", job=JOB, resume=True)
    begun(tmp_path / "out")
    for act in (Stage.check, Stage.open):
        with pytest.raises(SurgeryError, match="is of another job"):
            act(tmp_path / "out", job=OTHER, resume=True)
    with Stage.open(tmp_path / "out", job=JOB, resume=True) as stage:
        assert (stage.scratch / "distill-0" / "state").exists()


@pytest.mark.parametrize("place", ["discarded", "cleared"])
def test_a_kill_while_discarding_does_not_mix_two_jobs(tmp_path, monkeypatch, place):
    partial = begun(tmp_path / "out")
    real = Stage._clear

    def killed(stage, *but):
        if place == "cleared":
            real(stage, *but)
        raise KeyboardInterrupt

    monkeypatch.setattr(Stage, "_clear", killed)
    monkeypatch.setattr(Stage, "close", lambda stage: stage._lock.release())
    with pytest.raises(KeyboardInterrupt):
        Stage.open(tmp_path / "out", job=OTHER, discard_partial=True)
    monkeypatch.undo()
    assert partial.exists()
    with Stage.open(tmp_path / "out", job=JOB) as stage:  # nobody may go on from the half of it
        assert not any(stage.scratch.iterdir())


# What others have put where we write


def test_folders_of_others_beside_out(tmp_path):
    for name in ("out.replaced", "out.old", "out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("mine")
    before = tree(tmp_path)
    for act in (Stage.check, Stage.open):
        with pytest.raises(SurgeryError, match=r"out\.partial: holds thesis\.txt, which llmsurgeon did not put there"):
            act(tmp_path / "out", job=JOB)
    assert tree(tmp_path) == before
    (tmp_path / "out.partial" / "thesis.txt").unlink()
    finished(tmp_path / "out")
    finished(tmp_path / "out", overwrite=True)
    after = tree(tmp_path)
    assert {name: after[name] for name in before if "partial" not in name} == {
        name: content for name, content in before.items() if "partial" not in name
    }


@pytest.mark.parametrize("content", ["{}", "[]", "not json", '{"job": {"verb": "x"}, "files": {}}'])
def test_a_journal_of_somebody_else(tmp_path, content):
    (tmp_path / "out.partial" / "scratch").mkdir(parents=True)
    (tmp_path / "out.partial" / "scratch" / "notes").write_text("mine")
    (tmp_path / "out.partial" / "job.json").write_text(content)
    before = tree(tmp_path)
    for options in ({}, {"discard_partial": True}):
        with pytest.raises(SurgeryError, match=r"job\.json was not written by this tool"):
            Stage.open(tmp_path / "out", job=JOB, **options)
    assert tree(tmp_path) == before


def test_scratch_without_a_journal(tmp_path):
    (tmp_path / "out.partial" / "scratch").mkdir(parents=True)
    with pytest.raises(SurgeryError, match="was not written by this tool"):
        Stage.open(tmp_path / "out", job=JOB, discard_partial=True)


@pytest.mark.parametrize("name", ["out.partial", "out.partial/scratch", "out.partial/result", "out.partial/job.json"])
def test_links_are_not_followed(tmp_path, name):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes").write_text("mine")
    if "/" in name:
        begun(tmp_path / "out")
        remove(tmp_path / name)
    (tmp_path / name).symlink_to(mine)
    before = tree(tmp_path)
    for options in ({}, {"discard_partial": True}):
        with pytest.raises(SurgeryError, match=r"is not what llmsurgeon put there|is a file, a link or a mount point"):
            Stage.open(tmp_path / "out", job=JOB, **options)
    assert tree(tmp_path) == before


def test_links_inside_the_result_are_replaced_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "source").write_text("copied")
    with Stage.open(tmp_path / "out", job=JOB) as stage:
        for name in ("model.safetensors", "config.json", "copied.json", "checksums.b3"):
            (stage.path / name).symlink_to(precious)
        stage.write_weights({"a": torch.ones(2)})
        stage.write_file("config.json", "{}")
        stage.copy_file(tmp_path / "source", "copied.json")
        out = stage.commit()
    assert precious.read_text() == "mine" and verify_files(out) == []
    assert not any(path.is_symlink() for path in out.iterdir())


def test_a_partial_that_is_a_file(tmp_path):
    (tmp_path / "out.partial").write_text("mine")
    for act in (Stage.check, Stage.open):
        with pytest.raises(SurgeryError, match="is a file, a link or a mount point"):
            act(tmp_path / "out", job=JOB)
    assert (tmp_path / "out.partial").read_text() == "mine"


# What is replaced


FOREIGN = ["src/train.py", ".git/config", "checkpoint-500/model.safetensors", "notes.txt", ".hidden", "empty/"]


@pytest.mark.parametrize("name", FOREIGN)
def test_overwrite_refuses_what_it_did_not_write_by_name(tmp_path, name):
    out = finished(tmp_path / "out")
    path = out / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir() if name.endswith("/") else path.write_text("mine")
    before = tree(tmp_path)
    for act in (Stage.check, Stage.open):
        with pytest.raises(SurgeryError, match=f"holds {name.split('/')[0]}.*, which llmsurgeon did not write"):
            act(out, job=JOB, overwrite=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", [None, *CHECKSUMS])
def test_overwrite_refuses_a_checkpoint_of_others(tmp_path, kind):
    """A config.json is no proof, and neither are sums that somebody else wrote."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("config.json", "notes.txt"):
        (out / name).write_text("{}")
    if kind:
        made = [f"{file_sum(out / name, CHECKSUMS[kind])}  {name}\n" for name in ("config.json", "notes.txt")]
        (out / CHECKSUMS[kind].manifest).write_text("".join(made))
        assert verify_files(out) == []
    before = tree(tmp_path)
    with pytest.raises(SurgeryError, match="was not written by llmsurgeon"):
        Stage.open(out, job=JOB, overwrite=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("before", CHECKSUMS)
@pytest.mark.parametrize("after", CHECKSUMS)
def test_an_output_is_replaced_whatever_its_checksums(tmp_path, before, after):
    out = finished(tmp_path / "out", before)
    assert strangers(out).foreign == () and strangers(out).manifest == out / CHECKSUMS[before].manifest
    finished(tmp_path / "out", after, overwrite=True)
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "config.json", CHECKSUMS[after].manifest}
    assert verify_files(out) == []


def test_an_output_of_an_older_version_is_replaced(tmp_path):
    """Its manifest has the mark alone before its sums."""
    out = finished(tmp_path / "out", "sha256")
    lines = (out / "checksums.sha256").read_text().splitlines(keepends=True)
    (out / "checksums.sha256").write_text("".join([lines[0], *lines[2:]]))
    assert verify_files(out) == [] and len(lines) == 4
    assert verify_files(finished(out, overwrite=True)) == []


@pytest.mark.parametrize("kind", CHECKSUMS)
@pytest.mark.parametrize("when", ["before the swap", "after it"])
def test_a_commit_that_was_killed_tells_two_outputs_of_one_size_apart(tmp_path, monkeypatch, kind, when):
    out = finished(tmp_path / "out", kind, value=1)
    real = Stage._swap

    def killed(stage):
        if when == "after it":
            real(stage)
        raise KeyboardInterrupt

    monkeypatch.setattr(Stage, "_swap", killed)
    with pytest.raises(KeyboardInterrupt):
        finished(out, kind, value=2, overwrite=True)
    monkeypatch.undo()
    said = "It is whole" if when == "after it" else "exists already"
    with pytest.raises(SurgeryError, match=said):
        Stage.open(out, job=JOB)
    assert load_file(out / "model.safetensors")["a"].tolist() == [2 if when == "after it" else 1] * 2
    assert verify_files(finished(out, kind, value=2, overwrite=True)) == []
    assert load_file(out / "model.safetensors")["a"].tolist() == [2, 2]


def test_links_in_a_replaced_out_are_foreign(tmp_path):
    out = finished(tmp_path / "out")
    (tmp_path / "mine.json").write_text("{}")
    (out / "config.json").unlink()
    (out / "config.json").symlink_to(tmp_path / "mine.json")
    assert strangers(out).foreign == ("config.json",)
    with pytest.raises(SurgeryError, match=r"holds config\.json, which llmsurgeon did not write"):
        Stage.open(out, job=JOB, overwrite=True)


def test_a_file_that_came_into_the_old_out_meanwhile_is_kept(tmp_path, monkeypatch):
    out = finished(tmp_path / "out")
    real = Stage._swap

    def late(stage):
        (out / "notes.txt").write_text("mine")
        real(stage)

    monkeypatch.setattr(Stage, "_swap", late)
    with pytest.raises(SurgeryError, match=r"out is written, and whole.*they are kept in (\S+)") as raised:
        finished(out, overwrite=True)
    kept = Path(str(raised.value).rpartition(" ")[2])
    assert tree(kept) == {"notes.txt": b"mine"} and verify_files(out) == []
    assert {path.name for path in tmp_path.iterdir()} == {"out", kept.name}


@pytest.mark.parametrize("where", ["out/text.txt", "out/recipes/mine.yaml", "out.partial/text.txt"])
def test_what_the_run_reads_must_not_lie_in_what_it_replaces(tmp_path, where):
    out = finished(tmp_path / "out")
    path = tmp_path / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("text")
    for act in (Stage.check, Stage.open):
        with pytest.raises(SurgeryError, match=f"out: holds {path}, which this run reads"):
            act(out, job=JOB, overwrite=True, sources=(path,))
    assert path.read_text() == "text"


def test_a_model_whose_files_are_links_into_out(tmp_path):
    out = finished(tmp_path / "out")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").symlink_to(out / "model.safetensors")
    with pytest.raises(SurgeryError, match="which this run reads"):
        Stage.open(out, job=JOB, overwrite=True, sources=(tmp_path / "model",))


# The last steps


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EACCES, errno.EXDEV])
def test_a_rename_that_fails_loses_nothing(tmp_path, monkeypatch, code):
    begun(tmp_path / "out")

    def fail(*arguments):
        raise OSError(code, os.strerror(code))

    with Stage.open(tmp_path / "out", job=JOB) as stage:
        stage.write_weights({"a": torch.ones(2)})
        monkeypatch.setattr(os, "rename", fail)
        with pytest.raises(SurgeryError, match=r"What is finished stays in the \.partial folder"):
            stage.commit()
        monkeypatch.undo()
    assert (tmp_path / "out.partial/scratch/distill-0/state").read_text() == "hours of training"
    out = finished(tmp_path / "out")
    assert verify_files(out) == [] and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_an_out_that_appears_meanwhile_is_left_alone(tmp_path, overwrite):
    with Stage.open(tmp_path / "out", job=JOB, overwrite=overwrite) as stage:
        (stage.scratch / "state").write_text("hours of training")
        stage.write_weights({"a": torch.ones(2)})
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_text("mine")
        with pytest.raises(SurgeryError, match=r"exists already|was not written by llmsurgeon"):
            stage.commit()
    assert tree(tmp_path / "out") == {"notes.txt": b"mine"}
    assert (tmp_path / "out.partial/scratch/state").read_text() == "hours of training"


def test_what_cannot_be_removed_in_the_end_is_said(tmp_path, monkeypatch):
    def fail(*arguments):
        raise PermissionError(errno.EACCES, "no", "old")

    monkeypatch.setattr(Stage, "_tidy", fail)
    with pytest.raises(SurgeryError, match=r"out is written, and whole.*could not be removed: old: no permission"):
        finished(tmp_path / "out")
    monkeypatch.undo()
    assert verify_files(tmp_path / "out") == []
    with pytest.raises(SurgeryError, match=r"exists already.*It is whole"):
        Stage.check(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Places where nothing can be


def test_what_cannot_work_is_said_before_any_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out, message in {
        "": "the name of the output is empty",
        "/": "is where a file system is mounted",
        "/proc": "is where a file system is mounted",
        ".": "is the working folder",
        "n" * 250: "this name is too long for the file system",
        "d/" * 2100 + "out": "(?i)name is too long|name too long",
    }.items():
        for act in (Stage.check, Stage.open):
            with pytest.raises(SurgeryError, match=message):
                act(out, job=JOB)
    assert not list(tmp_path.iterdir())


def test_a_mount_point_is_refused(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "out")
    with pytest.raises(SurgeryError, match="is where a file system is mounted; choose a folder inside it"):
        Stage.check(tmp_path / "out")


# One file


def test_a_partial_file_of_another_program_and_links(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    out, partial = tmp_path / "m.gguf", tmp_path / "m.gguf.partial"
    for make in (lambda: partial.write_text("download"), lambda: partial.symlink_to(mine)):
        make()
        before = tree(tmp_path)
        with pytest.raises(SurgeryError, match="is a file, a link or a mount point"):
            FileStage.open(out, job=JOB)
        assert tree(tmp_path) == before
        partial.unlink()
    out.symlink_to(mine)
    with FileStage.open(out, job=JOB, overwrite=True) as stage:
        stage.path.write_text("new")
        stage.commit()
    assert mine.read_text() == "mine" and out.read_text() == "new" and not out.is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "m.gguf"}


def test_a_file_that_appears_meanwhile_is_left_alone(tmp_path):
    out = tmp_path / "m.gguf"
    with FileStage.open(out, job=JOB) as stage:
        stage.path.write_text("new")
        out.write_text("mine")
        with pytest.raises(SurgeryError, match="exists already"):
            stage.commit()
    assert tree(tmp_path) == {"m.gguf": b"mine"}


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "m.gguf")
    (tmp_path / "folder.gguf").mkdir()
    for name in ("m.gguf", "folder.gguf"):
        with pytest.raises(SurgeryError, match=r"can be replaced|is a folder"):
            FileStage.check(tmp_path / name, overwrite=True)


def test_a_killed_file_leaves_nothing_that_needs_a_flag(tmp_path):
    stage = FileStage.open(tmp_path / "m.gguf", job=JOB)
    stage.path.write_text("half")
    stage._lock.release()
    with FileStage.open(tmp_path / "m.gguf", job=OTHER) as stage:
        assert not stage.path.exists()
        stage.path.write_text("whole")
        stage.commit()
    assert tree(tmp_path) == {"m.gguf": b"whole"}


# Renames


@pytest.mark.parametrize("can", [True, False])
def test_move_never_replaces(tmp_path, monkeypatch, can):
    if not can:
        monkeypatch.setattr("llmsurgeon.checkpoint.atomic._renameat2", lambda: None)
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    with pytest.raises(FileExistsError):
        move(tmp_path / "a", tmp_path / "b")
    assert tree(tmp_path) == {"a": b"a", "b": b"b"}
    move(tmp_path / "a", tmp_path / "c")
    assert tree(tmp_path) == {"b": b"b", "c": b"a"}
    assert exchange(tmp_path / "b", tmp_path / "c") == can


def test_write_whole(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (tmp_path / "link").symlink_to(mine)
    with pytest.raises(FileExistsError):
        write_whole(tmp_path / "link", b"new")
    write_whole(tmp_path / "link", b"new", overwrite=True)
    assert tree(tmp_path) == {"link": b"new", "mine": b"mine"}
    assert (tmp_path / "link").stat().st_mode & 0o777 == mine.stat().st_mode & 0o777


def test_the_journal_names_the_job(tmp_path):
    journal = json.loads((begun(tmp_path / "out") / "job.json").read_text())
    assert journal["job"] == JOB and journal["begun"].startswith("20")
