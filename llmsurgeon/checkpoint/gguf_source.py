"""A GGUF file as a checkpoint in Hugging Face names: dequantised a tensor at a time, tokenizer written on demand.

The config is what transformers makes of the file's metadata; names come from the gguf package.
"""

from __future__ import annotations

import logging
import shutil
import weakref
from collections.abc import Iterator
from functools import cached_property
from hashlib import sha256
from math import isclose, log, pi, prod
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmsurgeon.checkpoint.gguf_file import GGUFEntry, GGUFFile
from llmsurgeon.checkpoint.gguf_tokenizer import write_tokenizer
from llmsurgeon.checkpoint.gguf_uneven import uneven_config, uneven_shapes
from llmsurgeon.checkpoint.source import Checkpoint
from llmsurgeon.errors import CheckpointError

UNEVEN = "deci"  # blocks of differing shape
# Architectures whose tensors differ by layout at most.
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "gpt2", UNEVEN)
PAIRED = ("llama", "mistral", UNEVEN)  # rows of queries and keys in an order of their own
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
        blocks = self._file.metadata.get(f"{self._architecture}.block_count")
        if not isinstance(blocks, int) or not 0 < blocks <= len(self._file.entries):
            raise CheckpointError(
                f"{path}: its metadata promises {blocks} blocks, and it has {len(self._file.entries)} tensors"
            )
        self._blocks = blocks
        self._dtype = dtype or self._stored_dtype()
        self.config, wanted = self._uneven() if self._architecture == UNEVEN else self._described()
        self.config["dtype"] = str(self._dtype).removeprefix("torch.")
        self.config["rope_parameters"] = self._rope(self.config)
        if self.config["rope_parameters"] is None:
            del self.config["rope_parameters"]
        self._entry_of, self._shape_of = self._match(wanted)

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entry_of[name]
        rows = prod(entry.shape[:-1])
        step = max(1, ROWS_AT_ONCE // entry.shape[-1])
        made = torch.empty(rows, entry.shape[-1], dtype=self._dtype)
        for first in range(0, rows, step):
            last = min(rows, first + step)
            made[first:last] = torch.from_numpy(np.array(self._file.rows(entry.name, first, last)))
        made = made.view(entry.shape)
        if self._architecture in PAIRED:
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
        """Made from the file's metadata, in a folder that lives as long as this object."""
        if self._tokenizer_folder is None:
            from transformers import GenerationConfig

            folder = Path(mkdtemp(prefix="llmsurgeon-"))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            write_tokenizer(self._file.metadata, folder, self.path)
            ids = {key: self.config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
            GenerationConfig(**{key: value for key, value in ids.items() if value is not None}).save_pretrained(folder)
            self._tokenizer_folder = folder
        return sorted(self._tokenizer_folder.iterdir())

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
        head_dim = self._file.metadata["deci.attention.key_length"]
        return config, uneven_shapes(config, head_dim, config["vocab_size"])

    def _described(self) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
        """The same of a model that transformers knows, from an empty one."""
        model = self._meta_model()
        config = model.config.to_diff_dict()
        for key in ("_name_or_path", "_model_name_or_path", "quantization_config", "transformers_version"):
            config.pop(key, None)
        config["architectures"] = [type(model).__name__]
        config["tie_word_embeddings"] = model.config.tie_word_embeddings
        tied = set(getattr(model, "all_tied_weights_keys", ())) if model.config.tie_word_embeddings else set()
        return config, {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in tied}

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

    def _rope(self, config: dict[str, Any]) -> dict[str, Any] | None:
        """`rope_parameters` with the file's scaling."""
        base = config.get("rope_parameters")
        found = {
            key.removeprefix(prefix): value
            for key, value in self._file.metadata.items()
            if key.startswith(prefix := f"{self._architecture}.rope.scaling.")
        }
        scaling = found.get("type", "none")
        if base is None or (scaling == "none" and ROPE_FACTORS not in self._file.entries):
            return base
        if ROPE_FACTORS in self._file.entries:
            return self._llama3_rope(base)
        if scaling not in ("linear", "yarn") or "factor" not in found:
            raise CheckpointError(f"{self.path}: RoPE scaling {scaling!r} of a GGUF file is not supported")
        made = base | {"rope_type": scaling, "factor": found["factor"]}
        if scaling == "yarn":
            original = found.get("original_context_length", config["max_position_embeddings"])
            made["original_max_position_embeddings"] = original
            if found.get("attn_factor", 1.0) != 1.0:  # llama.cpp multiplies its own factor by it
                made["attention_factor"] = found["attn_factor"] * (0.1 * log(found["factor"]) + 1)
        return made

    def _llama3_rope(self, base: dict[str, Any]) -> dict[str, Any]:
        """Llama 3.1's RoPE scaling (`apply_scaling` of its model code), kept in GGUF as one factor a frequency."""
        factors = self._file.rows(ROPE_FACTORS, 0, 1).reshape(-1)
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

    def _match(self, wanted: dict[str, tuple[int, ...]]) -> tuple[dict[str, GGUFEntry], dict[str, tuple[int, ...]]]:
        """For each name of the model: the file's tensor, and the shape that the model wants."""
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        architecture = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
        known = architecture.get(self._architecture) or architecture["llama"]  # mistral files use llama's names
        names = get_tensor_name_map(known, self._blocks)
        entry_of: dict[str, GGUFEntry] = {}
        for name, asked in wanted.items():
            stem, _, suffix = name.rpartition(".")
            entry = self._file.entries.get(f"{names.get_name(stem)}.{suffix}")
            if entry is None:
                raise CheckpointError(f"{self.path}: its metadata promises {name}, which the file does not have")
            transposed = self._architecture == "gpt2" and entry.name.endswith(TRANSPOSED)
            shape = entry.shape[::-1] if transposed else entry.shape
            if shape != asked:
                raise CheckpointError(f"{self.path}: {entry.name} has shape {shape}, its metadata asks for {asked}")
            entry_of[name] = entry
        unused = set(self._file.entries) - {entry.name for entry in entry_of.values()} - {ROPE_FACTORS}
        if unused:
            raise CheckpointError(f"{self.path}: {min(unused)} has no place in a {self.config['model_type']} model")
        return entry_of, wanted

    def _unpermute(self, name: str, weight: Tensor) -> Tensor:
        """Undo llama.cpp's order of query and key rows: it pairs neighbours for RoPE, transformers pairs halves."""
        key = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(name.split(".")[-2])
        if key is None:
            return weight
        blocks = self.config.get("block_configs")
        heads = (blocks[int(name.split(".")[1])]["attention"] if blocks else self.config)[key]
        pairs = weight.shape[0] // heads // 2
        return weight.view(heads, pairs, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
