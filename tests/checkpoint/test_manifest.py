from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time

import pytest
from blake3 import blake3

from llmsurgeon.checkpoint import following as following_sum
from llmsurgeon.checkpoint.checksums import CHECKSUMS, READ_STEP, checksum_of, file_sha256, file_sum
from llmsurgeon.checkpoint.following import FollowingSum
from llmsurgeon.checkpoint.manifest import own_manifest, read_manifest, verify_files
from llmsurgeon.checkpoint.opening import open_checkpoint
from llmsurgeon.checkpoint.writer import Stage
from llmsurgeon.errors import CheckpointError, SurgeryError


def write(folder, out, checksum="blake3"):
    checkpoint = open_checkpoint(folder)
    with Stage.open(out, job={"all": "x"}) as stage:
        stage.write_weights(checkpoint, max_shard_size=15_000, checksum=checksum)
        stage.write_file("config.json", json.dumps(checkpoint.config))
        return stage.commit()


@pytest.fixture
def written(folder, tmp_path):
    return write(folder, tmp_path / "written")


def test_a_sound_checkpoint_has_no_problems(written, folder, sharded):
    assert [verify_files(path) for path in (written, folder, sharded)] == [[], [], []]


@pytest.mark.parametrize("kind", CHECKSUMS)
def test_each_kind_of_checksum_is_written_and_checked(kind, folder, tmp_path):
    out = write(folder, tmp_path / "out", kind)
    manifest = out / CHECKSUMS[kind].manifest
    assert verify_files(out) == [] and own_manifest(out) == manifest
    assert set(read_manifest(manifest)) == {path.name for path in out.iterdir()} - {manifest.name}
    (out / "config.json").write_text("{}")
    [problem] = verify_files(out)
    assert "config.json: its content is not what was written" in problem and CHECKSUMS[kind].title in problem


def test_the_sums_are_those_of_the_reference():
    """Of 0 to 250 over and over, the published test vectors of BLAKE3 (test_vectors.json of the reference)."""
    published = {
        0: "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
        1: "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213",
    }
    for size, wanted in published.items():
        digest = CHECKSUMS["blake3"].begin()
        digest.update(bytes(place % 251 for place in range(size)))
        assert digest.hexdigest() == wanted


@pytest.mark.parametrize("kind", CHECKSUMS)
def test_a_file_is_summed_as_its_bytes_are(kind, tmp_path):
    data = os.urandom(3 * READ_STEP // 2 + 1)
    (tmp_path / "a").write_bytes(data)
    digest = CHECKSUMS[kind].begin()
    for at in range(0, len(data), 1_000_003):
        digest.update(memoryview(data)[at : at + 1_000_003])
    assert file_sum(tmp_path / "a", CHECKSUMS[kind]) == digest.hexdigest()


TOOLS = {"blake3": ["b3sum", "--check"], "sha256": ["sha256sum", "--check", "--strict"]}


@pytest.mark.parametrize("kind", TOOLS)
def test_the_tool_of_that_kind_agrees(kind, folder, tmp_path):
    if not shutil.which(TOOLS[kind][0]):
        pytest.skip(f"needs {TOOLS[kind][0]}")
    out = write(folder, tmp_path / "out", kind)
    subprocess.run([*TOOLS[kind], CHECKSUMS[kind].manifest], cwd=out, check=True)
    (out / "config.json").write_text("{}")
    assert subprocess.run([*TOOLS[kind], CHECKSUMS[kind].manifest], cwd=out, check=False).returncode


def test_every_line_is_one_that_b3sum_reads(written):
    """It knows no comments: two spaces between the sum, in small letters, and the name, on each line."""
    lines = (written / "checksums.b3").read_text().splitlines()
    for line in lines:
        match = re.fullmatch(r"([0-9a-f]{64})  (.+)", line)
        assert match and blake3((written / match[2]).read_bytes()).hexdigest() == match[1]
    assert len(set(lines)) == len(lines) - 1 and lines[0] == lines[-1]


def test_no_kind_of_that_name():
    with pytest.raises(SurgeryError, match="checksum 'md5': expected one of blake3, sha256, none"):
        checksum_of("md5")


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def again(manifest):
    """One of its names once more, with another's sum."""
    lines = manifest.read_text().splitlines()
    manifest.write_text("\n".join([*lines, lines[0][:66] + lines[1][66:]]))


DAMAGE = {
    "one bit": (lambda d: flip(d / "model-00002-of-00003.safetensors"), "BLAKE3 differs"),
    "config": (lambda d: (d / "config.json").write_text("{}"), "config.json: its content"),
    "missing": (lambda d: (d / "config.json").unlink(), "config.json: missing"),
    "missing shard": (lambda d: (d / "model-00002-of-00003.safetensors").unlink(), "is missing"),
    "extra": (lambda d: (d / "extra.txt").write_text("x"), "extra.txt: not in the manifest"),
    "truncated": (lambda d: (d / "model-00002-of-00003.safetensors").write_bytes(b"123"), "truncated"),
    "manifest": (lambda d: (d / "checksums.b3").write_text("nonsense\n"), "line 1 is not"),
    "manifest of others": (
        lambda d: (d / "checksums.sha256").write_text("1" * 64 + "  a.txt\n"),
        "a.txt: missing",
    ),
    "manifest twice": (lambda d: again(d / "checksums.b3"), "another BLAKE3 than before"),
    "manifest a pipe": (lambda d: ((d / "checksums.b3").unlink(), os.mkfifo(d / "checksums.b3")), "is a pipe"),
    "manifest path": (lambda d: (d / "checksums.b3").write_text("0" * 64 + "  ../x\n"), "line 1 is not"),
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
        read_manifest(tmp_path / "checksums.b3")


@pytest.mark.parametrize("kind", CHECKSUMS)
@pytest.mark.parametrize("size", [1, 1000, (1 << 24) + 5, 1 << 25])
def test_sum_behind_the_writer(size, kind, tmp_path):
    checksum = CHECKSUMS[kind]
    path = tmp_path / "a"
    data = bytes(range(256)) * (size // 256 + 1)
    path.write_bytes(data[:size])
    following = FollowingSum(path, size, "key", checksum)
    for at in range(0, size, max(1, size // 7)):
        following.advance(at)
    following.advance(size)
    assert following.result() == file_sum(path, checksum)


def test_sum_where_writing_early_cannot_be_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(following_sum, "_sync_file_range", lambda: None)
    flushed = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    (tmp_path / "a").write_bytes(b"123")
    following = FollowingSum(tmp_path / "a", 3, "key", CHECKSUMS["sha256"])
    following.advance(3)
    assert following.result() == file_sha256(tmp_path / "a") and len(flushed) == 1


def test_abandoned_sum_ends(tmp_path):
    (tmp_path / "a").write_bytes(bytes(10))
    following = FollowingSum(tmp_path / "a", 10, "key", CHECKSUMS["blake3"])
    following.abandon()
    assert not following.is_alive()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_forked_process_hashes_by_itself(tmp_path):
    """The threads that share a large file out stay in the process that began them."""
    large = tmp_path / "large"
    large.write_bytes(os.urandom(1 << 22))
    expected = file_sum(large, CHECKSUMS["blake3"])
    child = os.fork()
    if not child:
        os._exit(0 if file_sum(large, CHECKSUMS["blake3"]) == expected else 1)
    until = time.monotonic() + 60
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < until:
        time.sleep(0.02)
    if not ended[0]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended == (child, 0)
