"""Copied bytes lie in the blocks of the new file as they did in the source's, so that a file system can share them."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmsurgeon.checkpoint import writer
from llmsurgeon.checkpoint.manifest import verify_files
from llmsurgeon.checkpoint.opening import open_checkpoint
from llmsurgeon.checkpoint.shards import Shard
from llmsurgeon.checkpoint.sharing import aligned, shared_blocks
from llmsurgeon.checkpoint.transform import TransformedWeights, WeightTransform
from llmsurgeon.checkpoint.weight_file import Range
from llmsurgeon.checkpoint.writer import Stage
from tests.checkpoint.conftest import CONFIG

BLOCK = 4096


@pytest.fixture
def source(tmp_path):
    """Tensors of whole blocks, one of another size among them."""
    folder = tmp_path / "source"
    folder.mkdir()
    made = torch.Generator().manual_seed(0)
    weights = {f"model.layers.{i}.w": torch.randn(32, 256, generator=made).bfloat16() for i in range(6)}
    weights["model.layers.2.odd"] = torch.randn(52, generator=made).bfloat16()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 6}))
    return folder


def doubled(checkpoint):
    return TransformedWeights(checkpoint, [WeightTransform(("model.layers.1.w",), ("model.layers.1.w",), torch.neg)])


def written(source, out):
    checkpoint = open_checkpoint(source)
    with Stage.open(out, job={"all": "x"}) as stage:
        stage.write_weights(doubled(checkpoint), max_shard_size=70_000)
        stage.copy_file(source / "config.json")
        return stage.commit()


def test_what_is_copied_lies_as_it_did(source, tmp_path, monkeypatch):
    plain = written(source, tmp_path / "plain")
    monkeypatch.setattr(writer, "shared_blocks", lambda path, folder: BLOCK)
    steps = []
    real = os.copy_file_range

    def watched(*given):
        steps.append(given[2:])
        return real(*given)

    monkeypatch.setattr(os, "copy_file_range", watched)
    out = written(source, tmp_path / "out")
    before, files = open_checkpoint(source), open_checkpoint(out)
    assert len(files.weight_files) == 2 and verify_files(out) == []
    alike = [name for name in files if (files.location(name)[1] - before.location(name)[1]) % BLOCK == 0]
    # All but what is computed, and those behind the odd tensor in the file that begins before it.
    assert {f"model.layers.{i}.w" for i in (0, 3, 4, 5)} <= set(alike), alike
    assert sum(count for count, *_ in steps) == sum(
        (entry := before.location(name))[2] - entry[1] for name in before if name != "model.layers.1.w"
    )
    for file in files.weight_files:
        assert {n: t.tolist() for n, t in load_file(file.path).items()} == {
            n: t.tolist() for n, t in load_file(plain / file.path.name).items()
        }
        assert 0 <= file.size - (plain / file.path.name).stat().st_size < BLOCK


def shard(names=("a",)):
    header = (8).to_bytes(8, "little") + b"{}      "
    return Shard("model.safetensors", names, header, len(header) + 100_000)


@pytest.mark.parametrize(("ranges", "pad"), [
    ([], 0),
    ([(16, 4096 + 16, 100)], 0),
    ([(16, 24, 100)], 8),
    ([(16, 24, 100), (116, 4096, 5000)], -116 % 4096 if -116 % 8 == 0 else 8),
    ([(16, 20, 100)], 0),  # a source whose tensors are not at multiples of 8
    ([(16, 8, 100)], 4088),
])  # fmt: skip
def test_the_most_bytes_decide(tmp_path, ranges, pad):
    made = aligned(shard(), [(at, Range(tmp_path, start, start + count)) for at, start, count in ranges], BLOCK)
    assert made.size - shard().size == pad == len(made.header) - 16
    assert int.from_bytes(made.header[:8], "little") == len(made.header) - 8 and made.header[8:].strip() == b"{}"


def test_a_file_system_that_cannot_leaves_the_files_as_they_are(source, tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(95, "not supported")

    plain = written(source, tmp_path / "plain")
    monkeypatch.setattr("fcntl.ioctl", refused)
    assert shared_blocks(source / "model.safetensors", tmp_path) == 0
    out = written(source, tmp_path / "out")
    for path in plain.glob("*.safetensors"):
        assert (out / path.name).stat().st_size == path.stat().st_size
    assert not list(tmp_path.glob("tmp*"))
