"""A GGUF file as a checkpoint in Hugging Face names: dequantised a tensor at a time, tokenizer written on demand.

`architectures` says how the numbers lie, `config` what the metadata mean.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmsurgeon.checkpoint.companions import Companion, Companions
from llmsurgeon.checkpoint.config_file import check_sizes
from llmsurgeon.checkpoint.files import sample_sum
from llmsurgeon.checkpoint.gguf.architectures import (
    ARCHITECTURES,
    LONG_FACTORS,
    ROPE_FACTORS,
    SHORT_FACTORS,
    UNEVEN,
    Architecture,
    file_name,
    order,
    tensor_map,
)
from llmsurgeon.checkpoint.gguf.card import card_of
from llmsurgeon.checkpoint.gguf.config import model_type_of, read_config, scaled_rope
from llmsurgeon.checkpoint.gguf.file import GGUFEntry, GGUFFile
from llmsurgeon.checkpoint.gguf.parts import open_gguf
from llmsurgeon.checkpoint.gguf.tokenizer import write_tokenizer
from llmsurgeon.checkpoint.gguf.uneven import uneven_config, uneven_shapes
from llmsurgeon.checkpoint.kept import writing
from llmsurgeon.checkpoint.passing import passing_folder, sweep
from llmsurgeon.checkpoint.source import Checkpoint
from llmsurgeon.errors import CheckpointError

SUPPORTED = tuple(dict.fromkeys(row.name for row in (*ARCHITECTURES.values(), UNEVEN)))
# Read into the config, not as weights.
FACTORS = {ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS}
ROWS_AT_ONCE = 2**22  # numbers dequantised in float32 before they are cast


@dataclass(frozen=True)
class Piece:
    """Some of the rows of a tensor of the file, from row `first` on, which are one tensor of the model.

    `shape` is as they lie there, `less` is taken off each number (Gemma's gains are stored as 1 + w), `back` puts them
    in transformers' order.
    """

    entry: GGUFEntry
    first: int
    shape: tuple[int, ...]
    less: float = 0.0
    back: Callable[[Tensor], Tensor] | None = None


class GGUFCheckpoint(Checkpoint):
    """The tensors of a GGUF file, be it in several parts, each dequantised when asked for.

    `dtype` is what they are cast to: by default float32 for a file that holds its matrices so, float16 likewise,
    and bfloat16 for everything else, quantised files included.

    Raises:
        CheckpointError: damaged, of an unsupported architecture, or its tensors do not fit its metadata.
    """

    def __init__(self, path: Path, name: str | None = None, dtype: torch.dtype | None = None) -> None:
        self.name = name or str(path)
        self._tokenizer_folder: Path | None = None
        sweep()
        self._file = open_gguf(path)
        self.path = path = self._file.path
        self.stamps = tuple(part.stamp for part in self._file.parts)
        self._architecture = str(self._file.metadata.get("general.architecture"))
        model_type = model_type_of(self._file)
        if model_type is None and self._architecture != UNEVEN.name:
            raise CheckpointError(
                f"{path}: GGUF architecture {self._architecture!r} is not supported; supported are "
                f"{', '.join(SUPPORTED)}. Use the model's safetensors instead"
            )
        blocks = self._file.metadata.get(f"{self._architecture}.block_count")
        if not isinstance(blocks, int) or not 0 < blocks <= len(self._file.entries):
            raise CheckpointError(
                f"{path}: its metadata promises {blocks} blocks, and it has {len(self._file.entries)} tensors"
            )
        self._dtype = dtype or self._stored_dtype()
        self._row = ARCHITECTURES[model_type] if model_type else UNEVEN
        self.config, self._shape_of = self._described(model_type) if model_type else self._uneven()
        self.config["dtype"] = str(self._dtype).removeprefix("torch.")
        self._piece_of = self._match(blocks)

    def __getitem__(self, name: str) -> Tensor:
        piece = self._piece_of[name]
        rows, width = prod(piece.shape[:-1]), piece.shape[-1]
        step = max(1, ROWS_AT_ONCE // width)
        made = torch.empty(rows, width, dtype=self._dtype)
        for first in range(0, rows, step):
            last = min(rows, first + step)
            numbers = self._file.rows(piece.entry.name, piece.first + first, piece.first + last)
            made[first:last] = torch.from_numpy(numbers - piece.less if piece.less else np.array(numbers))
        made = made.view(piece.shape)
        return piece.back(made) if piece.back else made

    def __iter__(self) -> Iterator[str]:
        return iter(self._piece_of)

    def __len__(self) -> int:
        return len(self._piece_of)

    def __contains__(self, name: object) -> bool:
        return name in self._piece_of

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shape_of[name]

    def dtype(self, name: str) -> torch.dtype:
        if name not in self._piece_of:
            raise KeyError(name)
        return self._dtype

    def location(self, name: str) -> tuple[Path, int, int] | None:
        return None

    @property
    def card(self) -> Mapping[str, Any]:
        return card_of(self._file.metadata)

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        return self._sum(lambda part: f" {part.stamp.modified_ns} {self._dtype}")

    @cached_property
    def content(self) -> str:  # type: ignore[override]
        return self._sum(lambda part: "")

    def _sum(self, more: Callable[[GGUFFile], str]) -> str:
        status = []
        for part in self._file.parts:
            sample = sample_sum(part.path, part.data_start)
            said = f"{part.path.name} {part.size}{more(part)} {sample}"
            status.append(said.encode() + sha256(part.head()).digest())
        return sha256(b"\0".join(status)).hexdigest()

    @property
    def companions(self) -> Companions:
        """Made from the file's metadata, in a folder that lives as long as this object."""
        if self._tokenizer_folder is None:
            from transformers import GenerationConfig

            folder = passing_folder(self)
            ids = {key: self.config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
            known = GenerationConfig(**{key: value for key, value in ids.items() if value is not None})
            with writing(folder, then="set TMPDIR to a folder with room"):
                write_tokenizer(self._file.metadata, folder, self.path)
                known.save_pretrained(folder)
            self._tokenizer_folder = folder
        files = sorted(self._tokenizer_folder.iterdir())
        return Companions(tuple(Companion(file.name, self._tokenizer_folder) for file in files))

    def own_tokenizer_files(self) -> list[Path]:
        return []

    def _stored_dtype(self) -> torch.dtype:
        from gguf import GGMLQuantizationType as Kind

        # Norm gains are float32 in every GGUF file, so only matrices count.
        kinds = {entry.kind for entry in self._file.entries.values() if len(entry.shape) > 1}
        if kinds == {Kind.F32}:
            return torch.float32
        return torch.float16 if kinds <= {Kind.F16, Kind.F32} else torch.bfloat16

    def _uneven(self) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
        """Config, and name -> shape of every tensor, of a model with blocks of differing shape."""
        entries = self._file.entries
        config = uneven_config(self._file.metadata, entries, self.path)
        if "token_embd.weight" not in entries:
            raise CheckpointError(f"{self.path}: has no token_embd.weight")
        config["vocab_size"] = entries["token_embd.weight"].shape[0]
        config["rope_parameters"] = scaled_rope(
            self._file, config["rope_parameters"], config["max_position_embeddings"]
        )
        head_dim = self._file.metadata["deci.attention.key_length"]
        return config, uneven_shapes(config, head_dim, config["vocab_size"])

    def _described(self, model_type: str) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
        """(config, shapes) of a model that transformers knows, from an empty one."""
        from transformers import AutoConfig, AutoModelForCausalLM

        quiet = logging.getLogger("transformers")
        level = quiet.level
        quiet.setLevel(logging.ERROR)
        try:
            values = read_config(self._file, model_type)
            check_sizes(values, f"{self.path}: its metadata")
            config = AutoConfig.for_model(**values)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
        except CheckpointError:
            raise
        except Exception as error:  # whatever a lying value leads transformers, or arithmetic, into
            raise CheckpointError(f"{self.path}: its metadata does not describe a model: {error}") from error
        finally:
            quiet.setLevel(level)
        said = config.to_diff_dict()
        said.pop("transformers_version", None)
        described = {**said, "architectures": [type(model).__name__], "tie_word_embeddings": config.tie_word_embeddings}
        repeated = set(getattr(model, "all_tied_weights_keys", ())) if config.tie_word_embeddings else set()
        shapes = {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in repeated}
        return described, experts_apart(shapes, self._row)

    def _match(self, blocks: int) -> dict[str, Piece]:
        """For each name of the model: where its numbers lie."""
        names = tensor_map(self._row.name, blocks)
        pieces: dict[str, Piece] = {}
        parts: dict[str, int] = {}
        for name, asked in self._shape_of.items():
            target, part = file_name(names, name)
            entry = self._file.entries.get(target or "")
            if entry is None:
                raise CheckpointError(f"{self.path}: its metadata promises {name}, which the file does not have")
            attention = self._attention(int(entry.name.split(".")[1])) if entry.name.startswith("blk.") else (1, 1, 1)
            found = order(self._row, entry.name, *attention)
            there = asked[::-1] if found and self._row.transposed else asked
            less = float(self._row.gains_from_one and entry.name.endswith("norm.weight"))
            pieces[name] = Piece(entry, (part or 0) * prod(asked[:-1]), there, less, found and found.back)
            parts[entry.name] = parts.get(entry.name, 0) + 1
            whole = entry.shape if part is None else entry.shape[1:]
            if whole != there:
                raise CheckpointError(f"{self.path}: {entry.name} has shape {whole}, its metadata asks for {there}")
            if part is not None and part >= entry.shape[0]:
                raise CheckpointError(f"{self.path}: {entry.name} has {entry.shape[0]} parts, and there is no {part}")
        head = {"output.weight"} if self.config["tie_word_embeddings"] else set()
        unused = set(self._file.entries) - parts.keys() - FACTORS - head
        if unused:
            raise CheckpointError(f"{self.path}: {min(unused)} has no place in a {self.config['model_type']} model")
        return pieces

    def _attention(self, block: int) -> tuple[int, int, int]:
        """Heads, key/value heads and width of a head of one block."""

        def value(key: str, default: int) -> int:
            found = self._file.metadata.get(f"{self._architecture}.{key}", default)
            return int(found[block] if isinstance(found, list) else found)

        heads = value("attention.head_count", 1)
        width = value("embedding_length", 1) // (heads or 1)
        return heads, value("attention.head_count_kv", heads), value("attention.key_length", width)


def experts_apart(shapes: Mapping[str, tuple[int, ...]], row: Architecture) -> dict[str, tuple[int, ...]]:
    """Shapes under the class's names, which stack a layer's experts, under those of published files."""
    if row.experts is None:
        return dict(shapes)
    module, gate, up, down = row.experts
    made: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        own = name.replace(".mlp.", f".{module}.")
        stem, _, kind = own.rpartition(".")
        if not stem.endswith(".experts"):
            made[own] = shape
            continue
        count, rows, columns = shape
        kinds = {gate: rows // 2, up: rows // 2} if kind == "gate_up_proj" else {down: rows}
        made |= {f"{stem}.{i}.{part}.weight": (high, columns) for i in range(count) for part, high in kinds.items()}
    return made
