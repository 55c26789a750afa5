"""The metadata of a GGUF file as config.json: sizes, settings, windows and rotary positions.

What a file does not say is what llama.cpp takes for granted, not the default of a config class.
"""

from __future__ import annotations

from dataclasses import fields
from math import isclose, log, pi
from typing import Any

from llmsurgeon.checkpoint.gguf.architectures import (
    ARCHITECTURES,
    LONG_FACTORS,
    NO_CAP,
    ROPE_FACTORS,
    SHORT_FACTORS,
    Architecture,
)
from llmsurgeon.checkpoint.gguf.file import GGUFFile
from llmsurgeon.errors import CheckpointError

# Each size, and how config classes call it.
SIZES = (
    ("embedding_length", ("hidden_size",)),
    ("block_count", ("num_hidden_layers",)),
    ("feed_forward_length", ("intermediate_size", "n_inner", "ffn_hidden_size")),
    ("attention.head_count", ("num_attention_heads",)),
    ("attention.head_count_kv", ("num_key_value_heads", "num_kv_heads")),
    ("attention.key_length", ("head_dim",)),
    ("context_length", ("max_position_embeddings",)),
)
EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
GEMMA2_WINDOW = 4096


def model_type_of(file: GGUFFile) -> str | None:
    """transformers' model_type of a file with blocks of one shape, None where its architecture is not known here."""
    name = file.metadata.get("general.architecture")
    if name == "llama" and file.metadata.get("llama.expert_count"):
        return "mixtral"
    if name == "mistral":  # old files of models that llama.cpp runs as `llama`
        return "mistral"
    return next((model_type for model_type, row in ARCHITECTURES.items() if row.name == name), None)


def read_config(file: GGUFFile, model_type: str) -> dict[str, Any]:
    """config.json of a file with blocks of one shape, dtype and class apart.

    Raises:
        CheckpointError: a value is missing, or is none that this family can have.
    """
    return _Reader(file, model_type).config()


class _Reader:
    def __init__(self, file: GGUFFile, model_type: str) -> None:
        from transformers import AutoConfig

        self.file, self.model_type = file, model_type
        self.row: Architecture = ARCHITECTURES[model_type]
        self.prefix = f"{file.metadata['general.architecture']}."
        config_class = type(AutoConfig.for_model(model_type))
        self.known = {field.name for field in fields(config_class)} | set(config_class.attribute_map)

    def get(self, key: str, default: Any = None) -> Any:
        """The value under `key`, without the architecture's prefix."""
        return self.file.metadata.get(self.prefix + key, default)

    def number(self, key: str, default: int | None = None) -> int:
        """A positive whole number, the same for all blocks."""
        value = self.get(key, default)
        if isinstance(value, list) and len(set(map(str, value))) == 1:
            value = value[0]
        if isinstance(value, list):
            raise self.error(f"{self.prefix}{key} differs from block to block, {self.row.name} models here do not")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(f"{self.prefix}{key} must be a positive whole number, found {value!r}")
        return value

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path}: {message}")

    def named(self, names: tuple[str, ...], value: Any) -> dict[str, Any]:
        """`value` under that of the names which the config class has, if any."""
        return {name: value for name in names if name in self.known}

    def config(self) -> dict[str, Any]:
        """config.json's entries: sizes, positions and norms as the file has them, with the format's own defaults."""
        heads = self.number("attention.head_count")
        hidden = self.number("embedding_length")
        defaults = {"attention.head_count_kv": heads, "attention.key_length": hidden // heads, "context_length": 2048}
        sizes = {key: self.number(key, defaults.get(key)) for key, _ in SIZES}
        self.head_dim = sizes["attention.key_length"]
        if self.get("attention.value_length", self.head_dim) != self.head_dim:
            raise self.error("keys and values of different widths are not supported")
        if "head_dim" not in self.known and self.head_dim * heads != hidden:
            raise self.error(
                f"{heads} heads of {self.head_dim} do not fill the width of {hidden}, as {self.row.name}'s do"
            )
        config: dict[str, Any] = {"model_type": self.model_type}
        for key, names in SIZES:
            config |= self.named(names, sizes[key])
        if "token_embd.weight" not in self.file.entries:
            raise self.error("has no token_embd.weight")
        config["vocab_size"] = self.number("vocab_size", self.file.entries["token_embd.weight"].shape[0])
        config |= self._epsilon() | self._ids() | self._settings()
        config["tie_word_embeddings"] = tied(self.file)
        if self.row.wide_layers:
            layers = sizes["block_count"]
            config["query_pre_attn_scalar"] = self.row.query_width(layers, hidden, heads, self.head_dim)
        if self.model_type == "falcon":
            config |= self._falcon(heads, sizes["attention.head_count_kv"])
        config |= self._windows(sizes["block_count"]) | self._bare(sizes["block_count"])
        return config | (self._rope(sizes["context_length"]) if self.row.rope != "none" else {})

    def _epsilon(self) -> dict[str, float]:
        for key in ("layer_norm_rms_epsilon", "layer_norm_epsilon"):
            if isinstance(value := self.get(f"attention.{key}"), float):
                return self.named(EPSILONS, value)
        raise self.error(f"{self.prefix}attention.layer_norm_epsilon is missing")

    def _ids(self) -> dict[str, Any]:
        names = (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        return {f"{name}_token_id": self.file.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in names}

    def _settings(self) -> dict[str, Any]:
        """What the row says of settings: fixed, told by a tensor, or by a key."""
        found: dict[str, Any] = {key: values[0] for key, values in self.row.settings}
        for key, tensor, there in self.row.told_by:
            found[key] = there if f"blk.0.{tensor}" in self.file.entries else not there
        stack = self.file.entries.get("blk.0.ffn_gate_exps.weight")
        if self.row.experts and (stack is None or stack.shape[0] != self.number("expert_count")):
            raise self.error(f"promises {self.number('expert_count')} experts, and its tensors hold other than so many")
        for entry in self.row.keys:
            value = self.get(entry.name, entry.absent)
            if type(value) is not entry.kind:
                raise self.error(f"{self.prefix}{entry.name} must be a {entry.kind.__name__}, found {value!r}")
            found[entry.config] = None if isinstance(value, float) and value > NO_CAP / 2 else value
        return found

    def _falcon(self, heads: int, kv_heads: int) -> dict[str, Any]:
        """Which of Falcon's decoders it is, told by its second norm and its key/value heads."""
        if "blk.0.attn_norm_2.weight" in self.file.entries:
            return {"new_decoder_architecture": True, "num_kv_heads": kv_heads}
        if kv_heads in (1, heads):
            return {"new_decoder_architecture": False, "multi_query": kv_heads == 1, "num_kv_heads": heads}
        return {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, "num_kv_heads": kv_heads}

    def _windows(self, layers: int) -> dict[str, Any]:
        """Which blocks slide."""
        window = self.get("attention.sliding_window")
        if self.row.windows != "periodic":
            # Phi 3's files name a window that llama.cpp passes over.
            return self.named(("sliding_window",), window or None)
        if self.model_type == "gemma2":
            window = window or GEMMA2_WINDOW
        pattern = self.get("attention.sliding_window_pattern", self.row.full_every)
        slides = pattern if isinstance(pattern, list) else [(i + 1) % pattern != 0 for i in range(layers)]
        if len(slides) != layers:
            raise self.error(
                f"{self.prefix}attention.sliding_window_pattern has {len(slides)} entries for {layers} blocks"
            )
        kinds = ["sliding_attention" if slide and window else "full_attention" for slide in slides]
        return {"sliding_window": window or None, "layer_types": kinds}

    def _bare(self, layers: int) -> dict[str, Any]:
        """Blocks without rotary positions."""
        every = self.row.bare_every
        return {"no_rope_layers": [int((i + 1) % every != 0) for i in range(layers)]} if every else {}

    def _rope(self, context: int) -> dict[str, Any]:
        base: dict[str, Any] = {"rope_type": "default", "rope_theta": float(self.get("rope.freq_base", 10000.0))}
        turning = self.get("rope.dimension_count", self.head_dim)
        if self.row.partial_rope:
            # What a config class makes of the share is rounded down.
            share = turning / self.head_dim
            base["partial_rotary_factor"] = share if int(self.head_dim * share) == turning else share + 1e-6
        elif turning != self.head_dim:
            raise self.error(f"rotary positions on {turning} of {self.head_dim} dimensions are not supported")
        made = scaled_rope(self.file, base, context)
        if self.model_type == "gemma3_text":
            local = {"rope_type": "default", "rope_theta": float(self.get("rope.freq_base_swa", 10000.0))}
            return {"rope_parameters": {"full_attention": made, "sliding_attention": local}}
        if made["rope_type"] == "longrope":
            return {
                "rope_parameters": made,
                "original_max_position_embeddings": made["original_max_position_embeddings"],
            }
        return {"rope_parameters": made}


def scaled_rope(file: GGUFFile, base: dict[str, Any], context: int) -> dict[str, Any]:
    """The rotary positions `base` with the file's scaling; `context` is the length of its context.

    Raises:
        CheckpointError: a scaling that is not known here.
    """
    prefix = f"{file.metadata['general.architecture']}.rope.scaling."
    found = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    scaling, original = found.get("type", "none"), found.get("original_context_length", context)
    if ROPE_FACTORS in file.entries:
        return _llama3(file, base)
    if LONG_FACTORS in file.entries and SHORT_FACTORS in file.entries:
        return base | _long(file, original, found.get("attn_factor"))
    if scaling == "none":
        return base
    if scaling not in ("linear", "yarn") or "factor" not in found:
        raise CheckpointError(f"{file.path}: RoPE scaling {scaling!r} of a GGUF file is not supported")
    made = base | {"rope_type": scaling, "factor": found["factor"]}
    if scaling == "yarn":
        made["original_max_position_embeddings"] = original
        if found.get("attn_factor", 1.0) != 1.0:  # llama.cpp multiplies its own factor by it
            made["attention_factor"] = found["attn_factor"] * (0.1 * log(found["factor"]) + 1)
    return made


def _long(file: GGUFFile, original: int, attention: float | None) -> dict[str, Any]:
    """LongRoPE (arXiv 2402.13753)."""
    names = (("short_factor", SHORT_FACTORS), ("long_factor", LONG_FACTORS))
    made: dict[str, Any] = {"rope_type": "longrope", "original_max_position_embeddings": original}
    made |= {key: file.rows(tensor, 0, 1).reshape(-1).tolist() for key, tensor in names}
    return made if attention is None else made | {"attention_factor": attention}


def _llama3(file: GGUFFile, base: dict[str, Any]) -> dict[str, Any]:
    """Llama 3.1's RoPE scaling (`apply_scaling` of its model code), kept in GGUF as one factor a frequency."""
    factors = file.rows(ROPE_FACTORS, 0, 1).reshape(-1)
    low, high, original, factor = 1.0, 4.0, 8192, float(factors.max())
    for i, found in enumerate(factors):
        turns = original / (2 * pi * base["rope_theta"] ** (i / len(factors)))
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        expected = 1 / ((1 - smooth) / factor + smooth)
        if not isclose(found, expected, rel_tol=1e-3):
            raise CheckpointError(f"{file.path}: {ROPE_FACTORS} is not Llama 3.1's RoPE scaling; not supported")
    if factor == 1.0:
        return base
    return base | {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def tied(file: GGUFFile) -> bool:
    """True where the head is the embedding: none is there, or one of the same bytes."""
    head, embedding = (file.entries.get(f"{name}.weight") for name in ("output", "token_embd"))
    if head is None or embedding is None:
        return head is None
    return (head.kind, head.shape) == (embedding.kind, embedding.shape) and file.same_bytes(head, embedding)
