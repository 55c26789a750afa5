from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from llmsurgeon.checkpoint import commit, weight_file
from llmsurgeon.checkpoint.manifest import verify_files
from llmsurgeon.checkpoint.opening import open_checkpoint
from llmsurgeon.checkpoint.shards import parse_size, plan_shards
from llmsurgeon.checkpoint.transform import TransformedWeights, WeightTransform, remove, rename, row_blocks
from llmsurgeon.checkpoint.weight_file import copy_bytes, raise_unless_finite
from llmsurgeon.checkpoint.writer import Stage
from llmsurgeon.errors import CheckpointError, SurgeryError


def stack(*parts):
    """A generator of blocks, as an edit makes a tensor that is larger than memory."""
    for part in parts:
        for layer in row_blocks(part, 100):
            yield (layer.float() * 0.5).to(layer.dtype)


def split(matrix):
    return matrix[:8].clone(), matrix[8:].clone()


def edits() -> list[WeightTransform]:
    """One of each: computed, computed in blocks, one to many, renamed, removed; the rest passes through."""
    at = "model.layers.{}.".format
    up = [at(i) + "mlp.up_proj.weight" for i in (1, 2, 3)]
    down = [at(i) + "mlp.down_proj.weight" for i in (1, 2, 3)]
    query = at(4) + "self_attn.q_proj.weight"
    return [
        WeightTransform(tuple(up), (up[0],), stack),
        WeightTransform(tuple(down), (down[0],), lambda *parts: torch.cat(parts, dim=1)),
        WeightTransform((query,), (query, at(11) + "extra.weight"), split),
        rename(at(6) + "mlp.gate_proj.weight", at(2) + "mlp.gate2_proj.weight"),
        remove(at(7) + "mlp.gate_proj.weight", at(8) + "input_layernorm.weight"),
    ]


def convert(source: Path, out: Path, size: int | str = "5GB", job: str = "job", **options) -> Path:
    checkpoint = open_checkpoint(source)
    opened = {key: options.pop(key) for key in ("overwrite",) if key in options}
    with Stage.open(out, job={"all": job}, sources=(checkpoint.path,), **opened) as stage:
        (stage.scratch / "intermediate").write_text("x")
        stage.write_weights(TransformedWeights(checkpoint, edits()), max_shard_size=size, **options)
        stage.write_file("config.json", json.dumps(checkpoint.config))
        for path in checkpoint.tokenizer_files():
            stage.copy_file(path)
        return stage.commit()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("layout", ["folder", "sharded"])
@pytest.mark.parametrize("size", ["5GB", 6000, 1])
def test_streaming_equals_in_memory_bit_for_bit(layout, size, weights, tmp_path, request):
    out = convert(request.getfixturevalue(layout), tmp_path / "out", size)
    expected = TransformedWeights(weights, edits())
    written = open_checkpoint(out)
    assert set(written) == set(expected)
    for name in expected:
        assert torch.equal(written[name], expected[name]) and written[name].dtype == expected[name].dtype, name
    assert verify_files(out) == []
    assert not (tmp_path / "out.partial").exists()
    assert not [name for name in contents(out) if name.startswith(".")]


def test_state_dict_and_checkpoint_write_the_same_file(folder, weights, tmp_path):
    out = convert(folder, tmp_path / "streamed")
    with Stage.open(tmp_path / "memory", job={"all": "job"}) as stage:
        stage.write_weights(TransformedWeights(weights, edits()))
        memory = stage.commit()
    assert (out / "model.safetensors").read_bytes() == (memory / "model.safetensors").read_bytes()


@pytest.mark.parametrize("size", [3000, 8000, 20_000])
def test_shards_index_and_header(folder, weights, tmp_path, size):
    out = convert(folder, tmp_path / "out", size)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    expected = TransformedWeights(weights, edits())
    total = sum(t.numel() * t.itemsize for t in expected.values())
    assert index["metadata"] == {"total_parameters": sum(t.numel() for t in expected.values()), "total_size": total}
    shards = sorted(out.glob("*.safetensors"))
    assert [p.name for p in shards] == [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    held = []
    for path in shards:
        with safe_open(path, "pt") as file:  # the library's own reader agrees
            names = set(file.keys())
            assert file.metadata() == {"format": "pt"}
            assert {name for name, shard in index["weight_map"].items() if shard == path.name} == names
            held.append(sum(expected[name].numel() * expected[name].itemsize for name in names))
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    assert sum(held) == total and max(held) <= size
    assert len(held) <= 2 * -(-total // size)


def test_a_tensor_above_the_limit_gets_its_own_file():
    weights = {"a": torch.zeros(4), "b": torch.zeros(100), "c": torch.zeros(4)}
    assert [shard.names for shard in plan_shards(weights, weights, 40)] == [("a",), ("b",), ("c",)]


def test_layers_are_in_numeric_order(weights):
    (shard,) = plan_shards(weights, weights, 10**9)
    layers = [int(name.split(".")[2]) for name in shard.names if "gate_proj" in name]
    assert layers == list(range(12))


def test_untouched_bytes_never_enter_memory(folder, tmp_path, monkeypatch):
    checkpoint = open_checkpoint(folder)
    read = []
    original = type(checkpoint).__getitem__
    monkeypatch.setattr(type(checkpoint), "__getitem__", lambda self, name: read.append(name) or original(self, name))
    with Stage.open(tmp_path / "out", job={"all": "job"}) as stage:
        stage.write_weights(TransformedWeights(checkpoint, edits()))
    touched = {source for edit in edits() if edit.fn for source in edit.sources}
    assert sorted(read) == sorted(touched)  # and each of them once


@pytest.mark.parametrize("failing", [(), ("_copy_file_range",), ("_copy_file_range", "_sendfile")])
@pytest.mark.parametrize("code", [errno.EXDEV, errno.EINVAL, errno.ENOSYS])
def test_copy_falls_back_where_the_kernel_cannot(failing, code, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(code, "no")

    for name in failing:
        monkeypatch.setattr(weight_file, name, refuse)
    data = os.urandom(10_000)
    (tmp_path / "a").write_bytes(data)
    with (tmp_path / "a").open("rb") as a, (tmp_path / "b").open("wb") as b:
        assert copy_bytes(a.fileno(), b.fileno(), 123, 7, 5000) == 5000
        os.write(b.fileno(), b"end")
    assert (tmp_path / "b").read_bytes() == bytes(7) + data[123:5123] + b"end"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, 5, 11])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e5m2])
def test_nan_in_a_computed_tensor_is_named(bad, where, dtype, tmp_path):
    def spoil(tensor):
        tensor = tensor.clone()
        if not tensor.is_meta:
            tensor.view(-1)[where] = bad
        return tensor

    base = {"good": torch.ones(3, 4).to(dtype), "broken": torch.ones(3, 4).to(dtype)}
    weights = TransformedWeights(base, [WeightTransform(("broken",), ("broken",), spoil)])
    with pytest.raises(SurgeryError, match="'broken'"), Stage.open(tmp_path / "out", job={"all": "x"}) as stage:
        stage.write_weights(weights)
    assert not (tmp_path / "out").exists()
    with Stage.open(tmp_path / "out", job={"all": "x"}) as stage:
        stage.write_weights(weights, check_finite=False)
        stage.commit()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_large_numbers_are_finite_though_their_sum_is_not(dtype):
    raise_unless_finite("large", torch.full((64,), torch.finfo(dtype).max).to(dtype))


def test_infinities_that_cancel_out_are_found():
    with pytest.raises(SurgeryError, match="'both': the result holds NaN or infinity"):
        raise_unless_finite("both", torch.tensor([float("inf"), float("-inf")]))


def test_blocks_are_made_on_one_thread(tmp_path):
    seen = []

    def halves(tensor):
        for block in tensor.split(2):
            if not block.is_meta:  # of the plan
                seen.append(torch.get_num_threads())
            yield block / (0 if len(seen) == 2 else 2)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        weights = TransformedWeights({"a": torch.ones(8, 2)}, [WeightTransform(("a",), ("a",), halves)])
        with (
            Stage.open(tmp_path / "out", job={"all": "x"}) as stage,
            pytest.raises(SurgeryError, match="'a'") as raised,
        ):
            stage.write_weights(weights)
        assert seen == [1, 1] and raised.value
        assert torch.get_num_threads() == 2  # also after a failure, while its traceback is alive
    finally:
        torch.set_num_threads(before)


def test_progress_ends_at_the_total(folder, tmp_path):
    seen = []
    convert(folder, tmp_path / "out", 6000, progress=lambda done, total: seen.append((done, total)))
    size = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert seen[-1] == (size, size) and seen == sorted(seen)


# What is refused before anything is written


def refused(match: str, source: Path, out: Path, **options) -> None:
    before = {p: p.stat().st_mtime_ns for p in out.parent.rglob("*")} if out.parent.is_dir() else None
    with pytest.raises(SurgeryError, match=match):
        convert(source, out, **options)
    if before is not None:
        assert {p: p.stat().st_mtime_ns for p in out.parent.rglob("*") if p.is_file()} == {
            p: t for p, t in before.items() if p.is_file()
        }
        assert not out.with_name(out.name + ".partial").exists()


def test_existing_output(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    convert(folder, out)  # an empty folder is no obstacle
    refused("exists already", folder, out)
    (out / "checksums.b3").unlink()
    refused("was not written by llmsurgeon", folder, out, overwrite=True)
    (tmp_path / "file").write_text("x")
    refused("is not a folder", folder, tmp_path / "file", overwrite=True)


def test_source_as_output(folder, tmp_path):
    refused("is where the model is read from", folder, folder, overwrite=True)
    (tmp_path / "link").symlink_to(folder)
    refused("is where the model is read from", folder, tmp_path / "link", overwrite=True)
    refused("is where the model is read from", folder, folder.parent, overwrite=True)


def test_parent_that_is_a_file(folder, tmp_path):
    (tmp_path / "file").write_text("x")
    refused("is a file", folder, tmp_path / "file" / "out")


def test_no_permission(helpers):
    """As another user, since root may write everywhere."""
    parent = Path(tempfile.mkdtemp())
    try:
        parent.chmod(0o555)

        def work():
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            Stage.open(parent / "out", job={"all": "x"})

        status, said = helpers.in_child(work)
        assert status != 0 and said.startswith("SurgeryError") and "no permission to write here" in said
        assert list(parent.iterdir()) == []
    finally:
        shutil.rmtree(parent)


def test_not_enough_space(folder, tmp_path, monkeypatch):
    with pytest.raises(SurgeryError, match=r"1,000,000,000,000,000,000 bytes are needed and [\d,]+ are free"):
        Stage.open(tmp_path / "out", job={"all": "x"}, needed_bytes=10**18)
    assert not (tmp_path / "out.partial").exists()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with Stage.open(tmp_path / "out", job={"all": "x"}) as stage:
        with pytest.raises(SurgeryError, match="bytes are needed and 100 are free"):
            stage.write_weights(open_checkpoint(folder))
        assert not list(stage.path.iterdir())
        assert {p.name for p in stage.folder.iterdir()} == {"job.json", "lock", "result"}
    assert not (tmp_path / "out.partial").exists()


def test_foreign_staging_folder_is_left_alone(folder, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("x")
    with pytest.raises(SurgeryError, match=r"holds thesis\.txt, which llmsurgeon did not put there"):
        convert(folder, tmp_path / "out")
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "x"


def test_second_run_on_one_output_is_refused(folder, tmp_path):
    with Stage.open(tmp_path / "out", job={"all": "x"}), pytest.raises(SurgeryError, match="another run is writing it"):
        convert(folder, tmp_path / "out")
    convert(folder, tmp_path / "out")


@pytest.mark.parametrize("size", ["", "5XB", "-1", "0", "GB", "1" + "0" * 400])
def test_bad_sizes(size):
    with pytest.raises(SurgeryError, match="is not a file size"):
        parse_size(size)


def test_sizes():
    assert [parse_size(s) for s in ("5GB", "1.5 MB", "2KiB", "7", 9)] == [5 * 10**9, 1_500_000, 2048, 7, 9]


# Disks that fail half-way


def test_full_disk_then_resumed(folder, tmp_path, monkeypatch):
    expected = contents(convert(folder, tmp_path / "expected", 6000))
    left = 9

    def full(*arguments):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*arguments)

    original = weight_file._copy_file_range
    monkeypatch.setattr(weight_file, "_copy_file_range", full)
    with pytest.raises(SurgeryError, match=r"the disk is full \([\d,]+ bytes needed\).*started again"):
        convert(folder, tmp_path / "out", 6000)
    assert not (tmp_path / "out").exists()
    kept = json.loads((tmp_path / "out.partial" / "job.json").read_text())["files"]
    assert kept
    before = {file: (tmp_path / "out.partial" / "result" / file).stat().st_mtime_ns for file in kept}
    monkeypatch.undo()
    out = convert(folder, tmp_path / "out", 6000)
    assert contents(out) == expected
    assert {file: (out / file).stat().st_mtime_ns for file in kept} == before


def test_file_size_limit_of_the_system(folder, tmp_path, helpers):
    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        convert(folder, tmp_path / "out")

    status, said = helpers.in_child(work)
    assert status != 0 and said.startswith("SurgeryError") and "exceed the size that the system allows" in said
    assert not (tmp_path / "out").exists()


def test_source_that_shrinks_meanwhile(folder, tmp_path):
    checkpoint = open_checkpoint(folder)
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    with (
        pytest.raises(CheckpointError, match="became shorter"),
        Stage.open(tmp_path / "out", job={"all": "x"}) as stage,
    ):
        stage.write_weights(checkpoint)


# Going on


def test_damaged_or_foreign_shards_are_written_again(folder, tmp_path):
    expected = contents(convert(folder, tmp_path / "expected", 6000))
    with Stage.open(tmp_path / "out", job={"all": "job"}) as stage:
        stage.write_weights(TransformedWeights(open_checkpoint(folder), edits()), max_shard_size=6000)
    first, second = sorted((tmp_path / "out.partial" / "result").glob("*.safetensors"))[:2]
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    second.write_bytes(second.read_bytes()[:-1])
    assert contents(convert(folder, tmp_path / "out", 6000)) == expected


def test_scratch_survives_until_commit(tmp_path):
    with Stage.open(tmp_path / "out", job={"all": "x"}) as stage:
        (stage.scratch / "a").write_text("kept")
    with Stage.open(tmp_path / "out", job={"all": "x"}) as stage:
        assert (stage.scratch / "a").read_text() == "kept"
        stage.write_weights({"a": torch.ones(2)})
        assert not (stage.commit() / ".scratch").exists()


def killed_at(step: int, work) -> None:
    """Run `work`, and die by SIGKILL at the `step`-th touch of the disk."""
    left = step

    def counted(original):
        def call(*arguments, **options):
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        return call

    for owner, names in {
        os: ("write", "truncate", "copy_file_range", "fsync", "rename", "replace", "unlink", "rmdir", "mkdir"),
        Path: ("write_text", "write_bytes"),
        shutil: ("copyfile",),
    }.items():
        for name in names:
            setattr(owner, name, counted(getattr(owner, name)))
    work()


def state(folder: Path) -> frozenset[tuple[str, bytes | None]]:
    """All that a killed process leaves of an OUT."""
    paths = [path for top in folder.glob("out*") for path in (top, *top.rglob("*"))]
    return frozenset((str(path), None if path.is_dir() else path.read_bytes()) for path in paths)


def written(folder: Path, out: Path) -> Path:
    """An OUT of another job, to be replaced."""
    with Stage.open(out, job={"all": "old"}) as stage:
        stage.write_weights({"old": torch.ones(3)})
        stage.write_file("old.txt", "old")
        return stage.commit()


@pytest.mark.parametrize("how", ["new", "overwrite", "overwrite without exchange"])
def test_killed_at_every_step_then_run_again(how, folder, tmp_path, helpers, monkeypatch):
    expected = contents(convert(folder, tmp_path / "expected", 12_000))
    old = contents(written(folder, tmp_path / "old"))
    overwrite = how != "new"
    if how == "overwrite without exchange":  # as on a file system that cannot swap two names
        monkeypatch.setattr(commit, "exchange", lambda one, other: False)
    # A process that is killed loses nothing of what it has written, and waits for no disk here.
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    out = tmp_path / "out"
    step, gone_on_from = 0, set()
    while True:
        for path in tmp_path.glob("out*"):
            shutil.rmtree(path)
        if overwrite:
            shutil.copytree(tmp_path / "old", out)

        def work():
            convert(folder, out, 12_000, overwrite=overwrite)

        status, said = helpers.in_child(lambda step=step, work=work: killed_at(step, work))
        finished = status == 0
        assert finished or os.WTERMSIG(status) == signal.SIGKILL, said
        # Whatever the moment: the old or the new one is there and whole.
        found = contents(out) if out.exists() else None
        if how == "overwrite without exchange" and found is None:
            found = contents(tmp_path / "out.partial" / "replaced")
        assert found in ([old, expected] if overwrite else [None, expected])
        # What comes of a state that another step has left, too, is known.
        left = state(tmp_path)
        if left in gone_on_from and not finished:
            step += 1
            continue
        gone_on_from.add(left)
        status, said = helpers.in_child(work)
        if not overwrite and found:  # nothing is left to do but to tidy up
            assert status != 0 and "exists already" in said
            assert finished or not (tmp_path / "out.partial").exists()
        else:
            assert status == 0, said
        assert contents(out) == expected
        assert {p.name for p in tmp_path.glob("out*")} == {"out"}
        if finished:
            break
        step += 1
    assert step > 40 and len(gone_on_from) > 10
