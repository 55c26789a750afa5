from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmsurgeon.checkpoint.folder import SafetensorsCheckpoint
from llmsurgeon.checkpoint.opening import open_checkpoint, read_config
from llmsurgeon.errors import CheckpointError, SurgeryError

INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("layout", ["folder", "sharded"])
def test_reads_what_was_written(layout, weights, request):
    path = request.getfixturevalue(layout)
    checkpoint = open_checkpoint(str(path))
    assert set(checkpoint) == set(weights) and len(checkpoint) == len(weights)
    for name, tensor in weights.items():
        assert torch.equal(checkpoint[name], tensor) and checkpoint[name].dtype == tensor.dtype
        assert checkpoint.shape(name) == tuple(tensor.shape) and checkpoint.dtype(name) == tensor.dtype
        file, start, end = checkpoint.location(name)
        assert file.read_bytes()[start:end] == tensor.flatten().view(torch.uint8).numpy().tobytes()
        assert checkpoint.meta()[name].is_meta and checkpoint.meta()[name].shape == tensor.shape
    assert checkpoint.config["hidden_size"] == 16 and checkpoint.name == str(path)
    assert [p.name for p in checkpoint.tokenizer_files()] == ["generation_config.json", "tokenizer.json"]
    assert checkpoint.nbytes() == sum(t.numel() * t.itemsize for t in weights.values())
    assert "absent" not in checkpoint
    with pytest.raises(KeyError):
        checkpoint["absent"]


def test_writing_to_a_view_leaves_the_file_alone(folder):
    before = (folder / "model.safetensors").read_bytes()
    open_checkpoint(folder)["model.norm.weight"].zero_()
    assert (folder / "model.safetensors").read_bytes() == before


def test_unaligned_tensors_are_read(tmp_path, helpers):
    (tmp_path / "config.json").write_text("{}")
    values = torch.randn(3)
    data = b"\1" + values.view(torch.uint8).numpy().tobytes()
    table = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [3], "data_offsets": [1, 13]},
        "empty": {"dtype": "F32", "shape": [0, 4], "data_offsets": [13, 13]},
    }
    helpers.raw_safetensors(tmp_path / "model.safetensors", table, data)
    checkpoint = open_checkpoint(tmp_path)
    assert torch.equal(checkpoint["b"], values) and checkpoint["empty"].shape == (0, 4)


def test_fingerprint_follows_the_content(folder, tmp_path):
    first = open_checkpoint(folder).fingerprint
    assert open_checkpoint(folder).fingerprint == first
    os.utime(folder / "model.safetensors", ns=(1, 1))
    second = open_checkpoint(folder).fingerprint
    (folder / "config.json").write_text("{}")
    assert len({first, second, open_checkpoint(folder).fingerprint}) == 3


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


LIES = {
    "empty file": (b"", b"", None, "truncated"),
    "header longer than the file": ({"a": entry()}, bytes(8), 10_000, "truncated"),
    "absurd header": ({"a": entry()}, bytes(8), 2**63, "limit is 100,000,000"),
    "not json": (b"{'a'", b"", None, "not JSON"),
    "not utf-8": (b'{"\xff": 1}', b"", None, "not JSON"),
    "deep": (b'{"a":' + b"[" * 100_000, b"", None, "not JSON"),
    "list": ([1], b"", None, "not a JSON object"),
    "named twice": (b'{"a": {}, "a": {}}', b"", None, "names 'a' twice"),
    "no dtype": ({"a": {"shape": [2]}}, bytes(8), None, "must give dtype"),
    "unknown dtype": ({"a": entry(dtype="F31")}, bytes(8), None, "dtype 'F31' is not supported"),
    "dtype of another size": ({"a": entry(dtype="F64")}, bytes(8), None, "takes 16 bytes, data_offsets span 8"),
    "wrong shape": ({"a": entry(shape=[3])}, bytes(8), None, "takes 12 bytes, data_offsets span 8"),
    "negative": ({"a": entry(shape=[-2])}, bytes(8), None, "whole numbers"),
    "overflow": ({"a": entry(shape=[2**62, 4])}, bytes(8), None, "whole numbers"),
    "boolean size": ({"a": entry(shape=[True, 2])}, bytes(8), None, "whole numbers"),
    "past the end": ({"a": entry(offsets=[0, 8])}, bytes(4), None, "truncated: the header describes"),
    "bytes left over": ({"a": entry()}, bytes(9), None, "followed by unknown bytes"),
    "gap": ({"a": entry(offsets=[1, 9])}, bytes(9), None, "overlap or leave a gap"),
    "overlap": ({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12), None, "overlap or leave a gap"),
    "backwards": ({"a": entry(offsets=[8, 0])}, bytes(8), None, "span -8"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_headers_are_refused(lie, tmp_path, helpers):
    header, data, length, message = LIES[lie]
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "model.safetensors"
    helpers.raw_safetensors(path, header, data, length)
    if lie == "empty file":
        path.write_bytes(b"abc")
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert "model.safetensors" in str(caught.value)


def test_every_truncation_is_noticed(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for size in [*range(0, 300, 7), *range(300, len(whole), 997), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            open_checkpoint(folder)


def edit_index(folder: Path, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors is missing"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", r"..\x"])
def test_index_pointing_outside_is_refused(sharded, shard):
    shutil.copy(sharded / "model-00001-of-00003.safetensors", sharded.parent / "outside.safetensors")
    edit_index(sharded, lambda weight_map: weight_map.update({"model.norm.weight": shard}))
    with pytest.raises(CheckpointError, match="outside the folder"):
        open_checkpoint(sharded)


def test_a_shard_of_a_name_that_no_file_has(sharded):
    edit_index(sharded, lambda weight_map: weight_map.update({"model.norm.weight": "n" * 300}))
    with pytest.raises(SurgeryError, match="File name too long"):
        open_checkpoint(sharded)


def test_shard_linked_from_outside_is_refused_but_the_hub_cache_works(sharded, tmp_path):
    name = "model-00001-of-00003.safetensors"
    outside = tmp_path / "elsewhere.safetensors"
    (sharded / name).rename(outside)
    (sharded / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match="leads outside"):
        open_checkpoint(sharded)

    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "abc"
    shutil.copytree(sharded, snapshot)
    for path in list(snapshot.iterdir()):
        path.rename(cache / "blobs" / path.name)
        path.symlink_to(Path("../../blobs") / path.name)
    assert len(open_checkpoint(snapshot)) == len(open_checkpoint(snapshot).meta())


def test_index_and_shards_must_agree(sharded):
    edit_index(sharded, lambda weight_map: weight_map.update(absent="model-00001-of-00003.safetensors"))
    with pytest.raises(CheckpointError, match="'absent' should be in model-00001"):
        open_checkpoint(sharded)


def test_tensor_in_two_shards_is_refused(sharded, weights, helpers):
    from safetensors.torch import save_file

    name = next(iter(weights))
    part = {name: weights[name], "model.norm.weight": weights["model.norm.weight"]}
    save_file(part, sharded / "model-00002-of-00003.safetensors")
    with pytest.raises(CheckpointError, match="is in both"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_malformed_index(sharded, index):
    (sharded / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=INDEX):
        open_checkpoint(sharded)


@pytest.mark.parametrize("config", [None, "{", "[]"])
def test_malformed_config(folder, config):
    (folder / "config.json").unlink()
    if config:
        (folder / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(folder)


def test_pickles_are_refused_with_a_command_that_converts_them(tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=16, **sizes))
    model.config.save_pretrained(tmp_path / "old")
    torch.save(model.state_dict(), tmp_path / "old" / "pytorch_model.bin")
    for path in (tmp_path / "old", tmp_path / "old" / "pytorch_model.bin"):
        with pytest.raises(CheckpointError, match="pickle") as caught:
            open_checkpoint(path)
    command = str(caught.value).splitlines()[1].strip()
    assert "save_pretrained" in command and str(tmp_path / "old") in command
    command = command.replace("python ", sys.executable + " ", 1)
    command = command.replace(
        "; T.from_pretrained(src, trust_remote_code=False).save_pretrained(out)", ""
    )  # this model has no tokenizer
    subprocess.run(command, shell=True, cwd=tmp_path, check=True, capture_output=True)
    assert torch.equal(open_checkpoint(tmp_path / "old-safetensors")["lm_head.weight"], model.lm_head.weight)


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "a/b/c", "missing.gguf", "no spaces/here"])
def test_nothing_there(model):
    with pytest.raises(SurgeryError, match="no such file or folder"):
        open_checkpoint(model)


def test_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no weights here: expected .*gguf file$"):
        open_checkpoint(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"2 safetensors files and no model.safetensors.index.json"):
        open_checkpoint(tmp_path)


def test_offline_hub_id_says_so(tmp_path):
    script = (
        "from llmsurgeon.checkpoint.opening import open_checkpoint; from llmsurgeon.errors import SurgeryError\n"
        "try: open_checkpoint('some/model')\n"
        "except SurgeryError as error: print(error)\n"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(Path.cwd())}
    said = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True).stdout
    assert "some/model" in said and "HF_HUB_OFFLINE is set" in said


def test_hub_id_downloads_what_is_needed(folder, monkeypatch):
    import huggingface_hub

    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    checkpoint = open_checkpoint("owner/model", revision="v1")
    assert checkpoint.name == "owner/model" and asked["name"] == "owner/model" and asked["revision"] == "v1"
    assert "*.safetensors" in asked["allow_patterns"] and not any("bin" in p for p in asked["allow_patterns"])
    assert read_config("owner/model") == checkpoint.config and asked["allow_patterns"] == [
        "config.json",
        "adapter_config.json",
    ]


def test_read_config_needs_no_weights(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 3}')
    assert read_config(tmp_path) == read_config(str(tmp_path / "config.json")) == {"hidden_size": 3}


def test_config_code_is_never_run(folder):
    config = json.loads((folder / "config.json").read_text()) | {"auto_map": {"AutoConfig": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    assert isinstance(open_checkpoint(folder), SafetensorsCheckpoint)
