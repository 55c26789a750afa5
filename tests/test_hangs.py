"""Input that would be waited for, or computed on, without end: refused, or done in moments."""

from __future__ import annotations

import json
import os
import struct
import time

import pytest
import torch
from conftest import byte_tokenizer, save_tiny, tiny_config
from gguf import GGUFWriter
from gguf_models import export, save_uniform

from llmsurgeon.checkpoint.gguf.file import GGUFFile
from llmsurgeon.checkpoint.gguf.tokenizer import write_tokenizer
from llmsurgeon.checkpoint.opening import open_checkpoint, read_config
from llmsurgeon.checkpoint.safetensors_file import SafetensorsFile
from llmsurgeon.checkpoint.transform import TransformedWeights, rename
from llmsurgeon.errors import CheckpointError, RecipeError, SurgeryError
from llmsurgeon.formats.loading import load_tokenizer
from llmsurgeon.healing.distill.data import packed
from llmsurgeon.planning.opened import open_model
from llmsurgeon.planning.plan import _group_bytes
from llmsurgeon.recipe.recipe import loads
from llmsurgeon.text.files import file_text
from llmsurgeon.walk.memory import Room
from llmsurgeon.walk.streams import Streams


@pytest.fixture(autouse=True)
def within_seconds():
    """Processor time: other work on the machine does not count."""
    start = time.process_time()
    yield
    assert time.process_time() - start < 20


def test_a_header_that_names_a_tensor_twice_among_very_many(tmp_path):
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    names = [f"t{i}" for i in range(100_000)]
    header = "{" + ",".join(f'"{name}":{entry}' for name in [*names, "t5"]) + "}"
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    with pytest.raises(CheckpointError, match="names 't5' twice"):
        SafetensorsFile(path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("special", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_pipes_and_devices_in_a_checkpoint(tmp_path, name, special):
    folder = save_tiny(tmp_path / "parent", "llama", tokenizer=True)
    (folder / name).unlink()
    special(folder / name)
    with pytest.raises(CheckpointError, match=f"{name}: (is a (pipe|device)|expected a file)"):
        open_model(str(folder))
        load_tokenizer(str(folder))


def test_pipes_in_an_index(tmp_path):
    from conftest import tiny_model

    tiny_model("llama").save_pretrained(tmp_path / "parent", max_shard_size="40KB")
    shard = sorted((tmp_path / "parent").glob("model-*"))[0]
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(CheckpointError, match=f"{shard.name}: is a pipe, expected a regular file"):
        open_checkpoint(tmp_path / "parent")


def test_a_pipe_as_text(tmp_path):
    os.mkfifo(tmp_path / "text.txt")
    with pytest.raises(SurgeryError, match=r"text.txt: is a pipe, expected a regular file"):
        file_text(str(tmp_path / "text.txt"))


@pytest.mark.parametrize(("key", "value"), [
    ("num_hidden_layers", 1_000_000), ("layer_types", ["full_attention"] * 5000), ("vocab_size", 10**12),
    ("head_dim", 10**10), ("hidden_size", 10**11), ("max_position_embeddings", 10**12), ("num_experts", 10**6),
])  # fmt: skip
@pytest.mark.parametrize("inside", [False, True])
def test_a_config_of_a_model_that_nobody_could_build(tmp_path, key, value, inside):
    config = {**tiny_config("llama"), key: value}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config} if inside else config))
    with pytest.raises(CheckpointError, match=f"{key} (is|has) .*expected at most"):
        read_config(tmp_path)


def test_a_config_with_more_layers_than_tensors(tmp_path):
    folder = save_tiny(tmp_path / "parent", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4000}))
    with pytest.raises(CheckpointError, match=r"num_hidden_layers is 4,000, and the weights have \d+ tensors in all"):
        open_model(str(folder))


def sentence_pieces(tokens):
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
        "tokenizer.ggml.token_type": [2, *[1] * (len(tokens) - 1)],
    }


def test_tokens_of_megabytes(tmp_path):
    with pytest.raises(CheckpointError, match="token 1 of its tokenizer has 3,000,000 characters"):
        write_tokenizer(sentence_pieces(["<unk>", "a" * 3_000_000]), tmp_path, tmp_path)


def test_long_tokens_are_halved_where_there_are_halves(tmp_path):
    tokens = ["<unk>", "a", "b", "ab", *("ab" * n + "c" * 3000 for n in range(500))]
    write_tokenizer(sentence_pieces(tokens), tmp_path, tmp_path)
    found = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    assert found == [["a", "b"], *(["ab", tokens[n + 3]] for n in range(1, 500))]


def test_a_gguf_file_that_announces_too_much(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 1, 2**40) + bytes(1 << 20))
    with pytest.raises(CheckpointError, match="announces 1,099,511,627,776 metadata fields"):
        GGUFFile(path)


def test_packing_takes_time_in_proportion(tmp_path):
    """One piece of three million tokens: cutting it up row after row copied the rest each time."""

    class Tokenizer:
        bos_token_id = cls_token_id = sep_token_id = eos_token_id = None
        name_or_path = ""

        def __call__(self, text, **settings):
            return {"input_ids": list(range(len(text)))}

        def get_vocab(self):
            return {}

    rows = list(packed([["a" * 3_000_000]], Tokenizer(), 128, 10**9))
    assert len(rows) == 3_000_000 // 128
    assert all(row[0] == 128 * i and row[-1] == 128 * i + 127 for i, row in enumerate(rows))


def test_rows_of_special_tokens_only():
    tokenizer = byte_tokenizer()
    from tokenizers import processors

    framed = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer._tokenizer.post_processor = framed
    with pytest.raises(SurgeryError, match="rows of 1 tokens hold special tokens only"):
        next(packed([["abc"]], tokenizer, 1, 100))


@pytest.mark.parametrize("setting", ["batch: 1000000000", "batch: 60000, accumulate: 60000"])
def test_steps_of_more_rows_than_there_are(setting):
    with pytest.raises(RecipeError, match=r"expected (at most|less than or equal to)"):
        loads(f"version: 1\nsteps: [{{op: distill, {setting}}}]\n")


def test_the_peak_of_many_edits_is_found_in_one_pass():
    meta = {f"a{i}": torch.empty(2, 2, device="meta") for i in range(30_000)}
    made = TransformedWeights(meta, [rename(name, f"b{name}") for name in meta])
    assert max(_group_bytes(made, name) for name in made) == 0


def test_streams_take_their_room_at_once(tmp_path, monkeypatch):
    """A page of a map that finds no room would end the process."""
    monkeypatch.setattr("llmsurgeon.walk.streams.room", lambda: Room(1000, "a test"))

    def refuse(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(SurgeryError, match=r"the disk is full; hidden states take 48,000 bytes there: set TMPDIR"):
        Streams(3, (10, 20, 20), torch.float32)
    monkeypatch.undo()
    monkeypatch.setattr("llmsurgeon.walk.streams.room", lambda: Room(1000, "a test"))
    assert Streams(3, (10, 20, 20), torch.float32).data.shape == (3, 10, 20, 20)


# Where the tensors of a GGUF file lie


@pytest.fixture
def gguf(tmp_path):
    return export(save_uniform(tmp_path / "parent", "llama"), tmp_path / "a.gguf", "F16").path


def table_of(path):
    """Name -> where its type and its offset are in the file's table."""
    file, data, found = GGUFFile(path), path.read_bytes(), {}
    for name, entry in file.entries.items():
        row = struct.pack("<Q", len(name)) + name.encode()
        at = data.index(row) + len(row) + 4 + 8 * len(entry.shape)
        found[name] = (at, at + 4)
    return found


def write_at(path, at, raw):
    data = bytearray(path.read_bytes())
    data[at : at + len(raw)] = raw
    path.write_bytes(data)


def test_a_gguf_file_as_it_should_be(gguf):
    file = GGUFFile(gguf)
    assert len(file.entries) > 10
    # Filled up behind the last tensor or not.
    end = max(entry.end for entry in file.entries.values())
    os.truncate(gguf, end)
    assert GGUFFile(gguf).entries.keys() == file.entries.keys()


@pytest.mark.parametrize("shift", [-32, 32, 2, -64])
def test_offsets_that_stay_inside_the_file(gguf, shift):
    name = "blk.2.attn_q.weight"
    entry, (_, at) = GGUFFile(gguf).entries[name], table_of(gguf)[name]
    write_at(gguf, at, struct.pack("<Q", entry.start - GGUFFile(gguf).data_start + shift))
    with pytest.raises(CheckpointError, match=r"starts at byte .*, expected"):
        GGUFFile(gguf)


def test_two_tensors_in_one_place(gguf):
    one, other = "blk.2.attn_q.weight", "blk.3.attn_q.weight"
    table = table_of(gguf)
    data = gguf.read_bytes()
    write_at(gguf, table[one][1], data[table[other][1] : table[other][1] + 8])
    with pytest.raises(CheckpointError, match=r"starts at byte .*, expected"):
        GGUFFile(gguf)


@pytest.mark.parametrize("kind", [0, 2, 8])
def test_types_of_another_size(gguf, kind):
    """F32, Q4_0 and Q8_0 in place of F16: rows of 64 are whole blocks of them."""
    write_at(gguf, table_of(gguf)["blk.2.attn_q.weight"][0], struct.pack("<I", kind))
    with pytest.raises(CheckpointError, match=r"starts at byte .*, expected .*the type or shape of the one before"):
        GGUFFile(gguf)


@pytest.mark.parametrize("more", [1, 33, 4096])
def test_bytes_behind_the_last_tensor(gguf, more):
    with gguf.open("ab") as file:
        file.write(bytes(more))
    with pytest.raises(CheckpointError, match="its tensors end at byte"):
        GGUFFile(gguf)


def test_a_tensor_of_no_numbers(tmp_path):
    writer = GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("a", torch.zeros(4, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    at = (tmp_path / "a.gguf").read_bytes().index(struct.pack("<QI", 1, ord("a"))[:9]) + 9 + 4
    write_at(tmp_path / "a.gguf", at, struct.pack("<Q", 0))
    with pytest.raises(CheckpointError, match="tensor 'a' of no numbers"):
        GGUFFile(tmp_path / "a.gguf")
