"""What a model family declares: where its parts are, what its norms are, which config keys hold its sizes.

Nothing here computes. A new family is one instance of `Family` in a file of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llmsurgeon.errors import SurgeryError
from llmsurgeon.spec import AttentionSpec, BlockSpec, FFNSpec, ModelSpec, from_block_configs


@dataclass(frozen=True)
class Family:
    """A decoder family of transformers. Module paths double as tensor-name prefixes.

    `ffn_in` are the projections that read the normed input (for a gated FFN: gate, then up), `ffn_out`
    the one that writes the residual stream. `transposed` marks GPT-2's Conv1D, which stores [in, out].
    """

    model_type: str
    model_class: str
    layers: str
    embedding: str
    final_norm: str
    attention: str
    attention_norm: str
    ffn: str
    ffn_norm: str
    ffn_in: tuple[str, ...]
    ffn_out: str
    attention_out: str
    kv: tuple[str, ...] = ()
    head: str = "lm_head"
    norm: Literal["rms", "layer"] = "rms"
    transposed: bool = False
    parallel_residual_key: str | None = None
    hidden_key: str = "hidden_size"
    layers_key: str = "num_hidden_layers"
    heads_key: str = "num_attention_heads"
    kv_heads_key: str | None = "num_key_value_heads"
    width_key: str = "intermediate_size"
    positions_key: str = "max_position_embeddings"
    per_layer_lists: tuple[str, ...] = ("layer_types",)
    # Buffers that old checkpoints carry and today's classes do not have.
    ignored: tuple[str, ...] = (r"rotary_emb\.inv_freq$",)
    # Prefix that old checkpoints lack and today's classes add.
    optional_prefix: str = ""
    # (name in published checkpoints, name in today's class), where the two differ.
    legacy_names: tuple[tuple[str, str], ...] = ()
    # Config settings under which the layer order is part of the maths: (key, value, reason).
    refused: tuple[tuple[str, Any, str], ...] = ()
    examples: tuple[str, ...] = ()

    def layer(self, index: int) -> str:
        """Tensor-name prefix of block `index`, with its final dot."""
        return f"{self.layers}.{index}."

    def parallel_residual(self, config: Mapping[str, Any]) -> bool:
        """True where attention and FFN both read the block's input."""
        return bool(self.parallel_residual_key and config.get(self.parallel_residual_key, True))

    def is_attention(self, suffix: str) -> bool:
        """True where `suffix` (a tensor name inside a block) belongs to attention or its norm."""
        return suffix.startswith((f"{self.attention}.", f"{self.attention_norm}."))

    def is_ffn(self, suffix: str) -> bool:
        """True where `suffix` belongs to the FFN or its norm."""
        return suffix.startswith((f"{self.ffn}.", f"{self.ffn_norm}."))

    def ffn_tensor(self, projection: str, kind: str = "weight") -> str:
        """Name inside a block of one of the FFN's tensors."""
        return f"{self.ffn}.{projection}.{kind}"

    def describe(self, config: Mapping[str, Any]) -> ModelSpec:
        """The spec of a checkpoint with this (normalised) config.

        Raises:
            SurgeryError: sizes are missing, not positive, or contradict one another.
        """
        for key, value, reason in self.refused:
            if config.get(key) == value:
                raise SurgeryError(f"{self.model_type} with {key}={value!r} cannot be operated on: {reason}")
        hidden, heads = self._size(config, self.hidden_key), self._size(config, self.heads_key)
        layers = self._size(config, self.layers_key)
        kv_heads = self._size(config, self.kv_heads_key) if self.kv_heads_key else heads
        head_dim = config.get("head_dim") or hidden // heads
        width = config.get(self.width_key) or 4 * hidden
        windows = self._windows(config, layers)
        block_configs = config.get("block_configs")
        if block_configs:
            if len(block_configs) != layers:
                raise SurgeryError(
                    f"config.json: block_configs has {len(block_configs)} entries, "
                    f"{self.layers_key} says {layers}; they must agree"
                )
            blocks = from_block_configs(block_configs, head_dim, windows)
        else:
            blocks = tuple(
                BlockSpec(AttentionSpec(heads, kv_heads, head_dim, window), FFNSpec(width)) for window in windows
            )
        return ModelSpec(
            family=self.model_type,
            hidden=hidden,
            vocab=self._size(config, "vocab_size"),
            blocks=tuple(_with_parents(block, (i,)) for i, block in enumerate(blocks)),
            tied=bool(config.get("tie_word_embeddings", False)),
            max_positions=config.get(self.positions_key),
        )

    def _size(self, config: Mapping[str, Any], key: str) -> int:
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise SurgeryError(f"config.json: {key} must be a positive whole number, found {value!r}")
        return value

    def _windows(self, config: Mapping[str, Any], layers: int) -> list[int | None]:
        window = config.get("sliding_window")
        types = config.get("layer_types")
        if types is None:
            return [window] * layers
        if len(types) != layers:
            raise SurgeryError(
                f"config.json: layer_types has {len(types)} entries, {self.layers_key} says {layers}; they must agree"
            )
        return [window if kind == "sliding_attention" else None for kind in types]


def _with_parents(block: BlockSpec, parents: tuple[int, ...]) -> BlockSpec:
    return BlockSpec(
        block.attention, block.ffn, parents, tuple(_with_parents(branch, parents) for branch in block.branches)
    )
