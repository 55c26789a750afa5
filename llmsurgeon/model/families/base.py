"""What a model family declares: where its parts are, what its norms are, which config keys hold its sizes.

Nothing here computes. A new family is one instance of `Family` in a file of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from llmsurgeon.errors import SurgeryError
from llmsurgeon.model.block_transformer import from_block_transformer
from llmsurgeon.model.parts import AttentionSpec, FFNSpec, MoESpec
from llmsurgeon.model.spec import LayerSpec, ModelSpec, from_block_configs

# Families with a modeling file of the block form, modeling_block_<model_type>.py.
BLOCK_FORMS = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Experts:
    """How a mixture of experts is stored: a tensor for each expert in files, all of them stacked in today's class.

    gate, up, down are the names of an expert's projections in files, `module` that of the FFN in the class.
    """

    gate: str
    up: str
    down: str
    count_key: str
    per_token_key: str
    module: str = "mlp"
    # How published configs spell `count_key`, where today's class spells it otherwise.
    published_count_key: str = ""


@dataclass(frozen=True)
class Family:
    """A decoder family of transformers. Module paths double as tensor-name prefixes.

    `ffn_in` are the projections that read the normed input (for a gated FFN: gate, then up), `ffn_out`
    the one that writes the residual stream. `transposed` marks GPT-2's Conv1D, which stores [in, out].
    A norm is "" where the family has none; `ffn` is "" where the projections are the layer's own.
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
    # Modules of attention whose rows belong to key/value heads.
    kv: tuple[str, ...] = ()
    # Module of attention whose rows belong to query heads, where they are apart from keys and values.
    queries: str = ""
    # In place of `kv`: one projection, and how its rows lie: all queries, all keys, all values; or per key/value
    # head its queries, its key, its value.
    fused_qkv: tuple[str, Literal["by kind", "by head"]] | None = None
    # Queries, keys and values have biases whatever the config says, and attention's output projection has none.
    biased_qkv: bool = False
    # Each of `ffn_in` stacks so many projections of one width along its rows (gate over up: 2).
    ffn_stacked: int = 1
    # Norms on what attention and FFN give, before it is added to the stream.
    attention_post_norm: str = ""
    ffn_post_norm: str = ""
    # Attention and FFN read through one norm, `attention_norm`; a fused FFN gets `ffn_norm` of its own.
    shares_norm: bool = False
    # Config key of the factor on what attention and FFN add.
    residual_multiplier_key: str | None = None
    head: str = "lm_head"
    norm: Literal["rms", "layer"] = "rms"
    transposed: bool = False
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
    # Configs before transformers 5 have LongRoPE's factors by themselves in `rope_scaling`, under the key `type`.
    bare_longrope: bool = False
    # Key of config.json before transformers 5 in the place of layer_types: n where layers 0, n, 2n ... attend fully.
    full_every_key: str = ""
    # Buffers that old checkpoints carry and today's classes do not have.
    ignored: tuple[str, ...] = (r"rotary_emb\.inv_freq$",)
    # Path of a projection behind the final norm, which some sizes have.
    final_projection: str = ""
    # (name in published checkpoints, name in today's class), where the two differ.
    legacy_names: tuple[tuple[str, str], ...] = ()
    # Config settings under which the layer order is part of the maths: (key, value, reason).
    refused: tuple[tuple[str, Any, str], ...] = ()
    # The FFN is a mixture of experts; `ffn` is then its name in files, `ffn_in` and `ffn_out` are not used.
    experts: Experts | None = None
    # Settings that must have this value: (key, value, reason).
    required: tuple[tuple[str, Any, str], ...] = ()
    # Norms follow the residual sums, LN(x + f(x)), where others precede the parts, x + f(LN(x)). A part that goes
    # leaves its norm behind, LN(x): what comes next was trained to read that norm's output.
    post_norm: bool = False
    # Why the first block must stay where it is, "" where it need not.
    first_stays: str = ""
    # Reads text in both directions: no cache, no next token, hidden states are what it is for.
    encoder: bool = False
    # Classes that an encoder's checkpoints name in `architectures`, with the Auto class of each; the first has no head.
    # Paths above are those of the first; the others hold it under `prefix`.
    heads: tuple[tuple[str, str], ...] = ()
    prefix: str = ""
    # Key of the number of positions, less one, that no token takes: RoBERTa's begin behind its padding index.
    reserved_positions_key: str | None = None
    # Old spellings in tensor names, read and not written: (pattern, replacement).
    old_names: tuple[tuple[str, str], ...] = ()
    # Operations that this family's maths or classes cannot take: (operation, reason).
    unsupported: tuple[tuple[str, str], ...] = ()
    # (settings, fields): where the config has all the settings, these fields differ.
    layouts: tuple[tuple[Mapping[str, Any], Mapping[str, Any]], ...] = ()
    examples: tuple[str, ...] = ()

    def laid_out(self, config: Mapping[str, Any]) -> Family:
        """The declaration as it is for this (normalised) config."""
        changes: dict[str, Any] = {}
        for settings, fields in self.layouts:
            if all(config.get(key) == value for key, value in settings.items()):
                changes |= fields
        return replace(self, **changes) if changes else self

    @property
    def auto_class(self) -> str:
        """The Auto class of transformers that loads it."""
        return dict(self.heads).get(self.model_class, "AutoModelForCausalLM")

    def with_head(self, architectures: Sequence[str] | None) -> Family:
        """The family as the checkpoint's own class has it.

        Raises:
            SurgeryError: a class that the family does not know.
        """
        if not self.heads:
            return self
        base = self.heads[0][0]
        name = (architectures or [base])[0].removeprefix("Surgeon")
        if name not in dict(self.heads):
            raise SurgeryError(
                f"config.json: architectures names {name}, supported of {self.model_type} are "
                + ", ".join(head for head, _ in self.heads)
            )
        if name == base:
            return replace(self, head="")
        return replace(
            self,
            model_class=name,
            head=self.head if dict(self.heads)[name] in ("AutoModelForMaskedLM", "AutoModelForPreTraining") else "",
            layers=self.prefix + self.layers,
            embedding=self.prefix + self.embedding,
            final_norm=self.final_norm and self.prefix + self.final_norm,
        )

    def layer(self, index: int) -> str:
        """Tensor-name prefix of block `index`, with its final dot."""
        return f"{self.layers}.{index}."

    def parallel_residual(self, config: Mapping[str, Any]) -> bool:
        """True where attention and FFN both read the block's input."""
        return bool(self.parallel_residual_key and config.get(self.parallel_residual_key, True))

    def no_block_form(self) -> str | None:
        """Why it cannot become a block transformer, None where it can."""
        if self.encoder:
            return "it is an encoder: it predicts no next token, and so no next block"
        if self.model_type not in BLOCK_FORMS:
            return f"its class has no block form; {', '.join(BLOCK_FORMS)} have one"
        return None

    def no_sub_norm(self) -> str | None:
        """Why an RMSNorm cannot stand before the output projections, None where it can."""
        if self.norm != "rms" or self.encoder or self.experts:
            return "a norm before output projections is an RMSNorm, in a decoder of RMSNorms and dense FFNs"
        return None

    @property
    def sub_norms(self) -> dict[str, tuple[str, str]]:
        """Output projection's path inside a block -> (part, path of the norm that may stand before it)."""
        return {
            f"{self.attention}.{self.attention_out}": ("attention", f"{self.attention}.attn_sub_norm"),
            self.ffn_module(self.ffn_out): ("ffn", self.ffn_module("ffn_sub_norm")),
        }

    def is_attention(self, suffix: str) -> bool:
        """True where `suffix` (a tensor name inside a block) belongs to attention or its norm."""
        return _inside(suffix, self.attention, self.attention_norm, self.attention_post_norm)

    def is_ffn(self, suffix: str) -> bool:
        """True where `suffix` belongs to the FFN or its norm."""
        own = (self.ffn,) if self.ffn else (*self.ffn_in, self.ffn_out)
        return _inside(suffix, *own, self.ffn_norm, self.ffn_post_norm)

    def ffn_module(self, projection: str) -> str:
        """Path inside a block of one of the FFN's projections."""
        return f"{self.ffn}.{projection}" if self.ffn else projection

    @property
    def fast_ffn(self) -> str:
        """Path inside a block of the module that computes a whole FFN, where trees take its place."""
        return self.ffn or self.ffn_in[0].rpartition(".")[0]

    def ffn_tensor(self, projection: str, kind: str = "weight") -> str:
        """Name inside a block of one of the FFN's tensors."""
        return f"{self.ffn_module(projection)}.{kind}"

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


def _inside(suffix: str, *modules: str) -> bool:
    return suffix.startswith(tuple(f"{module}." for module in modules if module))


def _with_parents(layer: LayerSpec, parents: tuple[int, ...]) -> LayerSpec:
    return LayerSpec(
        layer.attention, layer.ffn, parents, tuple(_with_parents(branch, parents) for branch in layer.branches)
    )
