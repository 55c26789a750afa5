"""GGUF files in several parts are one model, whichever part is named; parts that do not belong together are refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from gguf_models import export, save_uniform
from operations.helpers import logits, some_tokens

from llmsurgeon.checkpoint.opening import open_checkpoint
from llmsurgeon.errors import CheckpointError
from llmsurgeon.export import export_gguf
from llmsurgeon.formats.loading import load_model, load_tokenizer


def split(file: Path, tensors: int, first_empty: bool = False) -> list[Path]:
    """The file written anew in parts of so many tensors, by the gguf package's own writer."""
    reader = gguf.GGUFReader(file)
    out = file.with_name("parts") / "m.gguf"
    out.parent.mkdir()
    architecture = reader.get_field("general.architecture").contents()
    writer = gguf.GGUFWriter(out, architecture, split_max_tensors=tensors, small_first_shard=first_empty)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return sorted(out.parent.glob("*.gguf"))


@pytest.fixture
def whole(tmp_path):
    folder = save_uniform(tmp_path / "parent", "llama")
    return export(folder, tmp_path / "m.gguf", "Q8_0").path


@pytest.mark.parametrize("first_empty", (False, True))
def test_parts_are_one_model(whole, first_empty):
    parts = split(whole, 20, first_empty)
    assert [part.name for part in parts] == [f"m-0000{i}-of-0000{len(parts)}.gguf" for i in range(1, len(parts) + 1)]
    assert len(parts) > 2
    expected, tokens = open_checkpoint(whole), some_tokens()
    for named in (*parts, parts[0].parent):
        found = open_checkpoint(named)
        assert found.config == expected.config and list(found) == list(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert len(found.stamps) == len(parts)
    assert torch.equal(logits(load_model(str(parts[-1])), tokens), logits(load_model(str(whole)), tokens))
    assert load_tokenizer(str(parts[1])).get_vocab() == load_tokenizer(str(whole)).get_vocab()
    assert len({open_checkpoint(each).fingerprint for each in parts}) == 1


def test_a_change_of_any_part_shows(whole):
    parts = split(whole, 20)
    before = open_checkpoint(parts[0])
    fingerprint = before.fingerprint
    data = bytearray(parts[-1].read_bytes())
    data[-1] ^= 1
    parts[-1].write_bytes(data)
    assert open_checkpoint(parts[0]).fingerprint != fingerprint
    with pytest.raises(CheckpointError, match=re.escape(parts[-1].name)):
        before.check_unchanged()


def test_what_is_exported_from_parts_is_whole(whole, tmp_path):
    """Nothing of how the source was split goes along."""
    parts = split(whole, 20)
    made = export_gguf(str(parts[0]), str(tmp_path / "again.gguf"), type="BF16").path
    assert not any(name.startswith("split.") for name in gguf.GGUFReader(made).fields)
    assert all(torch.equal(tensor, open_checkpoint(whole)[name]) for name, tensor in open_checkpoint(made).items())


def test_parts_that_do_not_belong_together(whole, tmp_path):
    parts = split(whole, 20)
    count = len(parts)
    kept = parts[1].read_bytes()
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=rf"of the {count} parts of this GGUF file {parts[1].name} is missing"):
        open_checkpoint(parts[0])
    shutil.copy(parts[2], parts[1])
    with pytest.raises(CheckpointError, match=rf"part 2 of {count}, its metadata say split.no 2 \(counted from 0\)"):
        open_checkpoint(parts[0])
    parts[1].write_bytes(kept)
    other = parts[0].with_name("first.gguf")
    shutil.copy(parts[0], other)
    with pytest.raises(CheckpointError, match=rf"one of {count} parts, .* NAME-00001-of-0000{count}.gguf"):
        open_checkpoint(other)
    with pytest.raises(CheckpointError, match=rf"holds {count + 1} GGUF files"):
        open_checkpoint(parts[0].parent)


def test_pieces_cut_in_bytes_are_to_be_joined(tmp_path):
    for name in ("m.gguf.part1of2", "m.gguf-split-a"):
        (tmp_path / name).write_bytes(b"GGUF")
        with pytest.raises(CheckpointError, match=r"cut in bytes; join the pieces .* cat PIECE1"):
            open_checkpoint(tmp_path / name)
