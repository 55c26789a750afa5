"""A checkpoint that is a folder of safetensors files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsurgeon.checkpoint.card_file import read_card
from llmsurgeon.checkpoint.companions import Companions, companions_of
from llmsurgeon.checkpoint.config_file import check_layers, read_config_file
from llmsurgeon.checkpoint.files import Stamp, sample_sum
from llmsurgeon.checkpoint.index import INDEX, WEIGHTS, read_index
from llmsurgeon.checkpoint.safetensors_file import SafetensorsFile, TensorEntry
from llmsurgeon.checkpoint.source import Checkpoint
from llmsurgeon.errors import CheckpointError


class SafetensorsCheckpoint(Checkpoint):
    """A folder with `model.safetensors`, or with shards and their index.

    Raises:
        CheckpointError: the folder is incomplete, damaged, points outside itself, or holds pickles only.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self.name = name or str(folder)
        self.path = folder
        held = folder / "config.json"
        config = [Stamp.of(held)] if held.exists() else []
        self.config = read_config_file(held)
        self._file_of, self.weight_files, index = _open_weights(folder)
        check_layers(self.config, len(self._file_of), str(held))
        self.stamps = (*config, *index, *(file.stamp for file in self.weight_files))

    def __getitem__(self, name: str) -> Tensor:
        return self._file_of[name].tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def _entry(self, name: str) -> TensorEntry:
        return self._file_of[name].entries[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name).dtype

    def location(self, name: str) -> tuple[Path, int, int] | None:
        entry = self._entry(name)
        return self._file_of[name].path, entry.start, entry.end

    @cached_property
    def companions(self) -> Companions:
        return companions_of(self.path, self.trust_remote_code)

    @property
    def card(self) -> Mapping[str, Any]:
        return read_card(self.path)

    @cached_property
    def _samples(self) -> list[str]:
        # Copying may keep the time of a file, and another training's header may be the same.
        return [sample_sum(file.path, file.data_start) for file in self.weight_files]

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        return self._sum(lambda file: f" {file.stamp.modified_ns}")

    @cached_property
    def content(self) -> str:  # type: ignore[override]
        return self._sum(lambda file: "")

    def _sum(self, more: Callable[[SafetensorsFile], str]) -> str:
        parts = [json.dumps(self.config, sort_keys=True).encode()]
        for file, sample in zip(self.weight_files, self._samples, strict=True):
            parts.append(f"{file.path.name} {file.size}{more(file)} {sample}".encode() + file.header)
        return sha256(b"\0".join(sha256(part).digest() for part in parts)).hexdigest()


def _open_weights(folder: Path) -> tuple[dict[str, SafetensorsFile], list[SafetensorsFile], list[Stamp]]:
    """Tensor name -> file, in file order; the files; and the stamp of the index, where there is one."""
    index: list[Stamp] = []
    if (folder / WEIGHTS).exists():  # the order in which transformers looks
        listed: dict[str, str] | None = None
        files = [SafetensorsFile(folder / WEIGHTS)]
    elif (folder / INDEX).exists():
        index = [Stamp.of(folder / INDEX)]
        listed = read_index(folder)
        files = [SafetensorsFile(folder / shard) for shard in sorted(set(listed.values()))]
    else:
        found = sorted(folder.glob("*.safetensors"))
        if len(found) > 1:
            raise CheckpointError(
                f"{folder}: {len(found)} safetensors files and no {INDEX} to say which belong together; "
                "download the index too"
            )
        listed = None
        files = [SafetensorsFile(found[0])]
    file_of: dict[str, SafetensorsFile] = {}
    for file in files:
        for name in file.entries:
            if name in file_of:
                raise CheckpointError(
                    f"{folder}: tensor {name!r} is in both {file_of[name].path.name} and {file.path.name}"
                )
            file_of[name] = file
    for name, shard in (listed or {}).items():
        if name not in file_of or file_of[name].path.name != shard:
            raise CheckpointError(f"{folder / INDEX}: tensor {name!r} should be in {shard}, which does not have it")
    if not file_of:
        raise CheckpointError(f"{folder}: the weight files hold no tensor")
    return file_of, files, index
