"""A checkpoint as everybody reads it: a mapping from names to tensors, each read from the disk when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsurgeon.checkpoint.companions import Companions
from llmsurgeon.checkpoint.files import Stamp


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, each read from disk when asked for.

    Attributes:
        name: the model as the user named it.
        path: the folder (or GGUF file) that is read.
        config: config.json as it is, nothing filled in.
        fingerprint: changes whenever a header, a size, a modification time, a sample of the numbers or the config does.
        content: the same without the times: copies of a model have one.
        stamps: of the files that are read for the model itself: config.json, the index, the weight files.
        trust_remote_code: whether the user lets code that the tokenizer brings along run, and go along.
    """

    name: str
    path: Path
    config: dict[str, Any]
    fingerprint: str
    content: str
    stamps: tuple[Stamp, ...]
    trust_remote_code: bool = False

    def check_unchanged(self) -> None:
        """Raise CheckpointError where a file of the model is not what it was when it was opened, and say which."""
        for stamp in self.stamps:
            stamp.check()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, from the header."""
        raise NotImplementedError

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of one tensor, from the header."""
        raise NotImplementedError

    def location(self, name: str) -> tuple[Path, int, int] | None:
        """The file and byte range (start, end) that hold exactly this tensor, or None where it is computed."""
        raise NotImplementedError

    @property
    def companions(self) -> Companions:
        """What goes along with the weights: tokenizer, chat template, generation config, pooling, image processor."""
        raise NotImplementedError

    @property
    def card(self) -> Mapping[str, Any]:
        """The metadata of the model's card, as a stranger wrote it; empty where there is none."""
        raise NotImplementedError

    def tokenizer_files(self) -> list[Path]:
        """Where the companions lie."""
        return self.companions.paths

    def own_tokenizer_files(self) -> list[Path]:
        """Those of `tokenizer_files` that are files of the checkpoint, and not made from its metadata."""
        return self.tokenizer_files()

    def meta(self) -> dict[str, Tensor]:
        """Every tensor on the meta device: names, shapes and dtypes without a byte of data."""
        return {name: torch.empty(self.shape(name), dtype=self.dtype(name), device="meta") for name in self}

    def nbytes(self, dtype: torch.dtype | None = None) -> int:
        """Bytes that all tensors take, uncompressed: in their own dtypes, or all in `dtype`."""
        return sum(t.numel() * (dtype or t.dtype).itemsize for t in self.meta().values())
