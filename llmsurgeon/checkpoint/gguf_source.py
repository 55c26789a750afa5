"""A GGUF file as a checkpoint in Hugging Face names: dequantised a tensor at a time, tokenizer written on demand.

The config and the tokenizer are what transformers makes of the file's metadata; names come from the gguf package.
"""

from __future__ import annotations

import logging
import shutil
import weakref
from collections.abc import Iterator
from functools import cached_property
from hashlib import sha256
from math import isclose, pi, prod
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmsurgeon.checkpoint.gguf_file import GGUFEntry, GGUFFile
from llmsurgeon.checkpoint.source import Checkpoint
from llmsurgeon.errors import CheckpointError

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "gpt2")  # architectures whose tensors differ by layout at most
ROPE_FACTORS = "rope_freqs.weight"
# GPT-2 of transformers stores these transposed (Conv1D).
TRANSPOSED = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
ROWS_AT_ONCE = 2**22  # numbers dequantised in float32 before they are cast


class GGUFCheckpoint(Checkpoint):
    """The tensors of a GGUF file, each dequantised when asked for.

    `dtype` is what they are cast to: by default float32 for a file that holds its matrices so, float16 likewise,
    and bfloat16 for everything else, quantised files included.

    Raises:
        CheckpointError: damaged, of an unsupported architecture, or its tensors do not fit its metadata.
    """

    def __init__(self, path: Path, name: str | None = None, dtype: torch.dtype | None = None) -> None:
        self.name = name or str(path)
        self.path = path
        self._tokenizer_folder: Path | None = None
        self._file = GGUFFile(path)
        self._architecture = str(self._file.metadata.get("general.architecture"))
        if self._architecture not in SUPPORTED:
            raise CheckpointError(
                f"{path}: GGUF architecture {self._architecture!r} is not supported; supported are "
                f"{', '.join(SUPPORTED)}. Use the model's safetensors instead"
            )
        self._dtype = dtype or self._stored_dtype()
        model = self._meta_model()
        self.config = self._make_config(model)
        self._entry_of, self._shape_of = self._match(model)

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entry_of[name]
        rows = prod(entry.shape[:-1])
        step = max(1, ROWS_AT_ONCE // entry.shape[-1])
        made = torch.empty(rows, entry.shape[-1], dtype=self._dtype)
        for first in range(0, rows, step):
            last = min(rows, first + step)
            made[first:last] = torch.from_numpy(np.array(self._file.rows(entry.name, first, last)))
        made = made.view(entry.shape)
        if self._architecture in ("llama", "mistral"):
            made = self._unpermute(entry.name, made)
        if self._architecture == "gpt2" and entry.name.endswith(TRANSPOSED):
            made = made.T.contiguous()
        return made.reshape(self._shape_of[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._entry_of)

    def __len__(self) -> int:
        return len(self._entry_of)

    def __contains__(self, name: object) -> bool:
        return name in self._entry_of

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shape_of[name]

    def dtype(self, name: str) -> torch.dtype:
        if name not in self._entry_of:
            raise KeyError(name)
        return self._dtype

    def location(self, name: str) -> tuple[Path, int, int] | None:
        return None

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        status = f"{self.path.name} {self._file.size} {self.path.stat().st_mtime_ns} {self._dtype}"
        return sha256(status.encode() + sha256(self._file.head()).digest()).hexdigest()

    def tokenizer_files(self) -> list[Path]:
        """Written by transformers from the file's metadata, into a folder that lives as long as this object."""
        if self._tokenizer_folder is None:
            from transformers import AutoTokenizer, GenerationConfig

            try:
                tokenizer = AutoTokenizer.from_pretrained(str(self.path.parent), gguf_file=self.path.name)
            except Exception as error:  # whatever its parsers meet in a stranger's file
                raise CheckpointError(f"{self.path}: its tokenizer cannot be converted: {error}") from error
            folder = mkdtemp(prefix="llmsurgeon-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            tokenizer.save_pretrained(folder)
            ids = {key: self.config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
            GenerationConfig(**{key: value for key, value in ids.items() if value is not None}).save_pretrained(folder)
            self._tokenizer_folder = Path(folder)
        return sorted(self._tokenizer_folder.iterdir())

    def _stored_dtype(self) -> torch.dtype:
        from gguf import GGMLQuantizationType as Kind

        # Norm gains are float32 in every GGUF file, so only matrices count.
        kinds = {entry.kind for entry in self._file.entries.values() if len(entry.shape) > 1}
        if kinds == {Kind.F32}:
            return torch.float32
        return torch.float16 if kinds <= {Kind.F16, Kind.F32} else torch.bfloat16

    def _meta_model(self) -> Any:
        from transformers import AutoConfig, AutoModelForCausalLM

        quiet = logging.getLogger("transformers")
        level = quiet.level
        quiet.setLevel(logging.ERROR)
        try:
            config = AutoConfig.from_pretrained(str(self.path.parent), gguf_file=self.path.name)
            config.tie_word_embeddings = "output.weight" not in self._file.entries
            # What the file says and transformers leaves at the default of the config's class.
            for attribute, key in (("max_position_embeddings", "context_length"), ("head_dim", "attention.key_length")):
                value = self._file.metadata.get(f"{self._architecture}.{key}")
                if value is not None and hasattr(config, attribute):
                    setattr(config, attribute, value)
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(config)
        except Exception as error:  # transformers raises whatever a lying value leads it into
            raise CheckpointError(f"{self.path}: its metadata does not describe a model: {error}") from error
        finally:
            quiet.setLevel(level)

    def _make_config(self, model: Any) -> dict[str, Any]:
        config = model.config.to_diff_dict()
        for key in ("_name_or_path", "_model_name_or_path", "quantization_config", "transformers_version"):
            config.pop(key, None)
        config["architectures"] = [type(model).__name__]
        config["dtype"] = str(self._dtype).removeprefix("torch.")
        config["tie_word_embeddings"] = model.config.tie_word_embeddings
        scaling = self._file.metadata.get(f"{self._architecture}.rope.scaling.type", "none")
        if scaling != "none":
            raise CheckpointError(f"{self.path}: RoPE scaling {scaling!r} of a GGUF file is not supported")
        if ROPE_FACTORS in self._file.entries:
            config["rope_parameters"] = self._llama3_rope(config)
        return config

    def _llama3_rope(self, config: dict[str, Any]) -> dict[str, Any]:
        """Llama 3.1's RoPE scaling (`apply_scaling` of its model code), kept in GGUF as one factor a frequency."""
        factors = self._file.rows(ROPE_FACTORS, 0, 1).reshape(-1)
        base = dict(config["rope_parameters"])
        low, high, original, factor = 1.0, 4.0, 8192, float(factors.max())
        for i, found in enumerate(factors):
            turns = original / (2 * pi * base["rope_theta"] ** (i / len(factors)))
            smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
            expected = 1 / ((1 - smooth) / factor + smooth)
            if not isclose(found, expected, rel_tol=1e-3):
                raise CheckpointError(f"{self.path}: {ROPE_FACTORS} is not Llama 3.1's RoPE scaling; not supported")
        if factor == 1.0:
            return base
        return base | {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }

    def _match(self, model: Any) -> tuple[dict[str, GGUFEntry], dict[str, tuple[int, ...]]]:
        """For each name of the model: the file's tensor, and the shape that the model wants."""
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        architecture = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
        known = architecture.get(self._architecture) or architecture["llama"]  # mistral files use llama's names
        names = get_tensor_name_map(known, model.config.num_hidden_layers)
        tied = set(getattr(model, "all_tied_weights_keys", ())) if model.config.tie_word_embeddings else set()
        entry_of: dict[str, GGUFEntry] = {}
        shape_of: dict[str, tuple[int, ...]] = {}
        for name, wanted in model.state_dict().items():
            if name in tied:
                continue
            stem, _, suffix = name.rpartition(".")
            entry = self._file.entries.get(f"{names.get_name(stem)}.{suffix}")
            if entry is None:
                raise CheckpointError(f"{self.path}: its metadata promises {name}, which the file does not have")
            transposed = self._architecture == "gpt2" and entry.name.endswith(TRANSPOSED)
            shape = entry.shape[::-1] if transposed else entry.shape
            if shape != tuple(wanted.shape):
                raise CheckpointError(
                    f"{self.path}: {entry.name} has shape {shape}, its metadata asks for {tuple(wanted.shape)}"
                )
            entry_of[name], shape_of[name] = entry, shape
        unused = set(self._file.entries) - {entry.name for entry in entry_of.values()} - {ROPE_FACTORS}
        if unused:
            raise CheckpointError(f"{self.path}: {min(unused)} has no place in a {model.config.model_type} model")
        return entry_of, shape_of

    def _unpermute(self, name: str, weight: Tensor) -> Tensor:
        """Undo llama.cpp's order of query and key rows: it pairs neighbours for RoPE, transformers pairs halves."""
        key = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(name.split(".")[-2])
        if key is None:
            return weight
        heads = self.config[key]
        pairs = weight.shape[0] // heads // 2
        return weight.view(heads, pairs, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
