from __future__ import annotations

import json
import os
import shutil
import subprocess

import pytest

from llmsurgeon.checkpoint import manifest
from llmsurgeon.checkpoint.manifest import FollowingHash, file_sha256, read_manifest, verify_files
from llmsurgeon.checkpoint.opening import open_checkpoint
from llmsurgeon.checkpoint.writer import Stage
from llmsurgeon.errors import CheckpointError


@pytest.fixture
def written(folder, tmp_path):
    checkpoint = open_checkpoint(folder)
    with Stage.open(tmp_path / "written", job={"all": "x"}) as stage:
        stage.write_weights(checkpoint, max_shard_size=15_000)
        stage.write_file("config.json", json.dumps(checkpoint.config))
        return stage.commit()


def test_a_sound_checkpoint_has_no_problems(written, folder, sharded):
    assert [verify_files(path) for path in (written, folder, sharded)] == [[], [], []]


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="needs sha256sum")
def test_sha256sum_agrees(written):
    subprocess.run(["sha256sum", "--check", "--strict", "checksums.sha256"], cwd=written, check=True)
    assert set(read_manifest(written)) == {p.name for p in written.iterdir()} - {"checksums.sha256"}


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "one bit": (lambda d: flip(d / "model-00002-of-00003.safetensors"), "SHA-256 differs"),
    "config": (lambda d: (d / "config.json").write_text("{}"), "config.json: its content"),
    "missing": (lambda d: (d / "config.json").unlink(), "config.json: missing"),
    "missing shard": (lambda d: (d / "model-00002-of-00003.safetensors").unlink(), "is missing"),
    "extra": (lambda d: (d / "extra.txt").write_text("x"), "extra.txt: not in the manifest"),
    "truncated": (lambda d: (d / "model-00002-of-00003.safetensors").write_bytes(b"123"), "truncated"),
    "manifest": (lambda d: (d / "checksums.sha256").write_text("nonsense\n"), "line 1 is not"),
    "manifest path": (lambda d: (d / "checksums.sha256").write_text("0" * 64 + "  ../x\n"), "line 1 is not"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found(damage, written):
    harm, message = DAMAGE[damage]
    assert len(list(written.glob("*.safetensors"))) == 3
    harm(written)
    problems = verify_files(written)
    assert any(message in problem for problem in problems), problems


def test_index_that_disagrees_with_its_shards(sharded):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["absent"] = index["weight_map"].pop("model.norm.weight")
    path.write_text(json.dumps(index))
    problems = verify_files(sharded)
    assert len(problems) == 2 and "'absent' should be in" in problems[0]
    assert "does not list tensor 'model.norm.weight'" in problems[1]


def test_no_folder_and_no_manifest(tmp_path):
    assert "no such folder" in verify_files(tmp_path / "absent")[0]
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("size", [1, 1000, (1 << 24) + 5, 1 << 25])
def test_hash_behind_the_writer(size, tmp_path):
    path = tmp_path / "a"
    data = bytes(range(256)) * (size // 256 + 1)
    path.write_bytes(data[:size])
    following = FollowingHash(path, size, "key")
    for at in range(0, size, max(1, size // 7)):
        following.advance(at)
    following.advance(size)
    assert following.result() == file_sha256(path)


def test_hash_where_writing_early_cannot_be_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "_sync_file_range", lambda: None)
    flushed = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    (tmp_path / "a").write_bytes(b"123")
    following = FollowingHash(tmp_path / "a", 3, "key")
    following.advance(3)
    assert following.result() == file_sha256(tmp_path / "a") and len(flushed) == 1


def test_abandoned_hash_ends(tmp_path):
    (tmp_path / "a").write_bytes(bytes(10))
    following = FollowingHash(tmp_path / "a", 10, "key")
    following.abandon()
    assert not following.is_alive()
