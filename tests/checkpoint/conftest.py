"""A tiny Llama-shaped checkpoint on disk, written with the safetensors library rather than with ours."""

from __future__ import annotations

import json
import os
import struct
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "num_hidden_layers": 12}


def tiny_weights(layers: int = 12) -> dict[str, Tensor]:
    """bfloat16 matrices and float32 gains, so that alignment and mixed dtypes are always tested."""
    made = torch.Generator().manual_seed(0)
    weights = {"model.embed_tokens.weight": torch.randn(33, 16, generator=made).bfloat16()}
    for i in range(layers):
        at = f"model.layers.{i}."
        weights[at + "input_layernorm.weight"] = torch.rand(16, generator=made)
        weights[at + "mlp.gate_proj.weight"] = torch.randn(24, 16, generator=made).bfloat16()
        weights[at + "mlp.up_proj.weight"] = torch.randn(24, 16, generator=made).bfloat16()
        weights[at + "mlp.down_proj.weight"] = torch.randn(16, 24, generator=made).bfloat16()
        weights[at + "self_attn.q_proj.weight"] = torch.randn(16, 16, generator=made).bfloat16()
    weights["model.norm.weight"] = torch.rand(16, generator=made)
    return weights


def write_folder(folder: Path, weights: dict[str, Tensor], shards: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    names = list(weights)
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: weights[name] for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def raw_safetensors(path: Path, table: object, data: bytes, length: int | None = None) -> Path:
    """A file with any header, true or not."""
    header = table if isinstance(table, bytes) else json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def in_child(work: Callable[[], object]) -> tuple[int, str]:
    """Run `work` in a forked process; its wait status and, where it raised, the error's text."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside torch's idle threads
        child = os.fork()
    if child == 0:
        status = 0
        try:
            torch.set_num_threads(1)
            work()
        except BaseException as error:
            status = 1
            os.write(writer, f"{type(error).__name__}: {error}\n{traceback.format_exc()}".encode()[:60000])
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read().decode()
    return os.waitpid(child, 0)[1], said


@pytest.fixture
def weights() -> dict[str, Tensor]:
    return tiny_weights()


@pytest.fixture
def folder(tmp_path: Path, weights: dict[str, Tensor]) -> Path:
    return write_folder(tmp_path / "source", weights)


@pytest.fixture
def sharded(tmp_path: Path, weights: dict[str, Tensor]) -> Path:
    return write_folder(tmp_path / "sharded", weights, shards=3)


class Helpers:
    tiny_weights = staticmethod(tiny_weights)
    write_folder = staticmethod(write_folder)
    raw_safetensors = staticmethod(raw_safetensors)
    in_child = staticmethod(in_child)


@pytest.fixture(scope="session")
def helpers() -> type[Helpers]:
    return Helpers
