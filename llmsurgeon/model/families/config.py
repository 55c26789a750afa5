"""What a family's config.json says: under which keys its sizes are, and the description that follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llmsurgeon.errors import SurgeryError
from llmsurgeon.model.block_transformer import from_block_transformer
from llmsurgeon.model.families.modules import Modules
from llmsurgeon.model.parts import AttentionSpec, FFNSpec, MoESpec
from llmsurgeon.model.spec import LayerSpec, ModelSpec, from_block_configs


@dataclass(frozen=True, kw_only=True)
class ConfigKeys(Modules):
    """Keys of a family's config.json, as today's classes spell them, and settings that are refused."""

    # Config key of the factor on what attention and FFN add.
    residual_multiplier_key: str | None = None
    parallel_residual_key: str | None = None
    hidden_key: str = "hidden_size"
    layers_key: str = "num_hidden_layers"
    heads_key: str = "num_attention_heads"
    kv_heads_key: str | None = "num_key_value_heads"
    # How many key/value heads there are where no key says; None: as many as query heads.
    fixed_kv_heads: int | None = None
    # None: always 4 * hidden.
    width_key: str | None = "intermediate_size"
    positions_key: str = "max_position_embeddings"
    # Key of the number of positions, less one, that no token takes: RoBERTa's begin behind its padding index.
    reserved_positions_key: str | None = None
    window_key: str = "sliding_window"
    per_layer_lists: tuple[str, ...] = ("layer_types",)
    # Keys of rules that would make such a list anew for a model without gaps: left out once layers are gone.
    layer_rules: tuple[str, ...] = ()
    # Key of a per-layer list that is false where attention has no rotary positions.
    rope_list: str | None = None
    # (key of config.json before transformers 5, where its value is in rope_parameters): a key, or layer type and key.
    old_rope: tuple[tuple[str, str], ...] = (
        ("rope_theta", "rope_theta"),
        ("partial_rotary_factor", "partial_rotary_factor"),
    )
    # Whether its class takes heads of another width than hidden size / heads, by `head_dim`: a field of its config
    # ("declared"), or read where a config has it ("read"); "" where it does not.
    own_head_dim: Literal["", "declared", "read"] = ""
    # Configs before transformers 5 have LongRoPE's factors by themselves in `rope_scaling`, under the key `type`.
    bare_longrope: bool = False
    # Key of config.json before transformers 5 in the place of layer_types: n where layers 0, n, 2n ... attend fully.
    full_every_key: str = ""
    # Config settings under which the layer order is part of the maths: (key, value, reason).
    refused: tuple[tuple[str, Any, str], ...] = ()
    # Settings that must have this value: (key, value, reason).
    required: tuple[tuple[str, Any, str], ...] = ()

    def parallel_residual(self, config: Mapping[str, Any]) -> bool:
        """True where attention and FFN both read the layer's input."""
        return bool(self.parallel_residual_key and config.get(self.parallel_residual_key, True))

    def describe(self, config: Mapping[str, Any]) -> ModelSpec:
        """The spec of a checkpoint with this (normalised) config.

        Raises:
            SurgeryError: sizes are missing, not positive, or contradict one another.
        """
        for key, value, reason in self.refused:
            if config.get(key) == value:
                raise SurgeryError(f"{self.model_type} with {key}={value!r} cannot be operated on: {reason}")
        for key, value, reason in self.required:
            if config.get(key, value) != value:
                found = config[key]
                raise SurgeryError(f"{self.model_type} with {key}={found!r} cannot be operated on: {reason}")
        hidden, heads = self._size(config, self.hidden_key), self._size(config, self.heads_key)
        layers = self._size(config, self.layers_key)
        kv_heads = self._size(config, self.kv_heads_key) if self.kv_heads_key else self.fixed_kv_heads or heads
        head_dim = config.get("head_dim") or hidden // heads
        width = (self.width_key and config.get(self.width_key)) or 4 * hidden
        windows, ropes = self._windows(config, layers), self._ropes(config, layers)
        block_configs = config.get("block_configs")
        if block_configs:
            if len(block_configs) != layers:
                raise SurgeryError(
                    f"config.json: block_configs has {len(block_configs)} entries, "
                    f"{self.layers_key} says {layers}; they must agree"
                )
            described = from_block_configs(block_configs, head_dim, windows, ropes)
        else:
            described = tuple(
                LayerSpec(AttentionSpec(heads, kv_heads, head_dim, window, rope), self._ffn(config, width))
                for window, rope in zip(windows, ropes, strict=True)
            )
        parted = config.get("block_transformer")
        return ModelSpec(
            family=self.model_type,
            hidden=hidden,
            vocab=self._size(config, "vocab_size"),
            layers=tuple(_with_parents(layer, (i,)) for i, layer in enumerate(described)),
            tied=bool(self.head and config.get("tie_word_embeddings", False)),
            max_positions=self._positions(config),
            block_transformer=from_block_transformer(parted, layers, hidden) if parted else None,
        )

    def _ffn(self, config: Mapping[str, Any], width: int) -> FFNSpec:
        if self.experts is None:
            return FFNSpec(width)
        experts, per_token = (self._size(config, key) for key in (self.experts.count_key, self.experts.per_token_key))
        if per_token > experts:
            raise SurgeryError(f"config.json: {per_token} experts a token, and {experts} in all")
        return MoESpec(width, experts=experts, per_token=per_token)

    def _size(self, config: Mapping[str, Any], key: str) -> int:
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise SurgeryError(f"config.json: {key} must be a positive whole number, found {value!r}")
        return value

    def _positions(self, config: Mapping[str, Any]) -> int | None:
        positions = config.get(self.positions_key)
        if positions is None or self.reserved_positions_key is None:
            return positions
        return int(positions) - (config.get(self.reserved_positions_key) or 0) - 1

    def _windows(self, config: Mapping[str, Any], layers: int) -> list[int | None]:
        window = config.get(self.window_key)
        types = config.get("layer_types")
        if types is None:
            return [window] * layers
        if len(types) != layers:
            raise SurgeryError(
                f"config.json: layer_types has {len(types)} entries, {self.layers_key} says {layers}; they must agree"
            )
        return [window if kind == "sliding_attention" else None for kind in types]

    def _ropes(self, config: Mapping[str, Any], layers: int) -> list[bool]:
        ropes = config.get(self.rope_list) if self.rope_list else None
        if ropes is None:
            return [True] * layers
        if len(ropes) < layers:
            raise SurgeryError(
                f"config.json: {self.rope_list} has {len(ropes)} entries, {self.layers_key} says {layers}"
            )
        return [bool(rope) for rope in ropes[:layers]]


def _with_parents(layer: LayerSpec, parents: tuple[int, ...]) -> LayerSpec:
    return LayerSpec(
        layer.attention, layer.ffn, parents, tuple(_with_parents(branch, parents) for branch in layer.branches)
    )
