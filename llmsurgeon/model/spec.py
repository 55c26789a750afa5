"""A model as a tuple of blocks: the description every operation edits and every format writes.

A block is attention and a feed-forward network (FFN); either may be absent. Widths may differ
from block to block. `to_block_configs` writes the description in the field names that NVIDIA's
Puzzle / Nemotron-NAS checkpoints use (arXiv 2411.19146), extended where those have no word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from llmsurgeon.errors import SurgeryError


@dataclass(frozen=True)
class AttentionSpec:
    """Softmax attention: `heads` query heads and `kv_heads` key/value heads of `head_dim` each.

    `window` is the sliding window in tokens, None for full attention; `rope` is False where a family leaves rotary
    positions out of some layers; `sub_norm`: an RMSNorm before the output projection (SubLN, as in BitNet b1.58).
    """

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    rope: bool = True
    sub_norm: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """What the sizes of its tensors follow from: heads, key/value heads, head width."""
        return self.heads, self.kv_heads, self.head_dim

    @property
    def kv_width(self) -> int:
        """Numbers cached for each token: keys and values together."""
        return 2 * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class MLGRUSpec(AttentionSpec):
    """An MLGRU in the place of an attention (arXiv 2406.02528): a gated recurrence with a state of one size.

    The state has a channel for each of the attention's query heads' own; `in_bias` and `out_bias` say which projections
    have biases beside the forget gate's. `ternary`: its projections are BitLinears.
    """

    in_bias: bool = False
    out_bias: bool = False
    ternary: bool = False

    @classmethod
    def instead_of(cls, attention: AttentionSpec, **projections: bool) -> MLGRUSpec:
        """One with as many channels as the attention has, all heads counted."""
        return cls(attention.heads, attention.heads, attention.head_dim, None, False, **projections)

    @property
    def width(self) -> int:
        """Channels of the state, which is what a sequence keeps in the cache."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Nothing is cached for each token."""
        return 0


@dataclass(frozen=True)
class FFNSpec:
    """A dense feed-forward network with `width` inner channels.

    A fused FFN may need what its family's class lacks: a norm that it does not share with attention (`own_norm`), or
    biases on the projections that read it (`bias`). `sub_norm`: an RMSNorm before the output projection.
    """

    width: int
    own_norm: bool = False
    bias: bool = False
    sub_norm: bool = False


@dataclass(frozen=True)
class MoESpec(FFNSpec):
    """A mixture of `experts` FFNs of `width` channels each, of which a router chooses `per_token` for each token."""

    experts: int = 0
    per_token: int = 0


@dataclass(frozen=True)
class FFFSpec(FFNSpec):
    """A fast feedforward network: neurons in trees of `depth` levels of decisions. `width` counts all that are stored.

    leaf: a tree of hyperplanes chooses one of 2^depth leaves of `leaf_width` neurons; `shared` neurons always work
        (arXiv 2308.14711).
    node: each node of `trees` trees is a neuron whose pre-activation also decides (arXiv 2311.10770).
    """

    form: Literal["leaf", "node"] = "leaf"
    depth: int = 0
    leaf_width: int = 0
    shared: int = 0
    trees: int = 0
    gated: bool = False
    in_bias: bool = False

    @classmethod
    def of_leaves(cls, depth: int, leaf_width: int, shared: int = 0, **neurons: bool) -> FFFSpec:
        """The leaf form of these sizes; `neurons` says whether they are gated and have biases on what they read."""
        width = shared + 2**depth * leaf_width
        return cls(width, form="leaf", depth=depth, leaf_width=leaf_width, shared=shared, **neurons)

    @classmethod
    def of_nodes(cls, depth: int, trees: int, **neurons: bool) -> FFFSpec:
        """The node form of these sizes."""
        return cls(trees * (2 ** (depth + 1) - 1), form="node", depth=depth, trees=trees, **neurons)

    @property
    def active(self) -> int:
        """Neurons that a token visits."""
        return self.shared + self.leaf_width if self.form == "leaf" else self.trees * (self.depth + 1)

    @property
    def words(self) -> str:
        """The trees' shape for people."""
        if self.form == "node":
            return f"{self.trees} trees of depth {self.depth}"
        return f"depth {self.depth}, {2**self.depth} leaves of {self.leaf_width} neurons, {self.shared} shared"

    @property
    def rows(self) -> int:
        """Weight rows of the model's width that a token multiplies; a dense FFN of n neurons has 2 n, gated 3 n."""
        return self.active * (3 if self.gated else 2) + (self.depth if self.form == "leaf" else 0)


@dataclass(frozen=True)
class BitFFNSpec(FFNSpec):
    """A dense FFN whose `projections` are BitLinears: ternary weights, 8-bit activations, a norm of its own each."""

    projections: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerSpec:
    """One layer of the model. `parents` are the layers of the original model whose work it does.

    `branches`, when present, are blocks that read the same input and whose contributions add up
    (full-block parallelisation, FFN Fusion section 5); attention and ffn are then None.
    """

    attention: AttentionSpec | None
    ffn: FFNSpec | None
    parents: tuple[int, ...] = ()
    branches: tuple[LayerSpec, ...] = ()

    @property
    def attentions(self) -> tuple[AttentionSpec, ...]:
        """Every attention in the block, in cache-slot order."""
        own = () if self.attention is None else (self.attention,)
        return own + tuple(a for branch in self.branches for a in branch.attentions)

    @property
    def empty(self) -> bool:
        """True where the block only passes its input on."""
        return self.attention is None and self.ffn is None and not self.branches

    @property
    def own_kind(self) -> str | None:
        """What the block has that no family's own class has, as a verb and its object; None without such a part."""
        if isinstance(self.attention, MLGRUSpec):
            return "has an MLGRU in the place of its attention"
        if isinstance(self.ffn, FFFSpec):
            return "has a fast feedforward network"
        if isinstance(self.ffn, BitFFNSpec):
            return "has BitLinears in its FFN"
        return "has a norm before an output projection" if self.sub_normed else None

    @property
    def sub_normed(self) -> tuple[str, ...]:
        """Which of its own parts, attention and ffn, have an RMSNorm before their output projection."""
        parts = (("attention", self.attention), ("ffn", self.ffn))
        return tuple(name for name, part in parts if part and part.sub_norm)


@dataclass(frozen=True)
class BlockTransformerSpec:
    """A decoder in two halves (Block Transformer, arXiv 2406.02657), `block_length` tokens to a block of text.

    split: layers before it form the block decoder, which attends over blocks; the others the token decoder, which
        attends within one.
    embedder: `concat` looks up hidden / block_length numbers a token and lays them side by side; `projected` looks up
        whole embeddings and projects them to one.
    decoder: how the token decoder reads a block's context: as `prefix_length` tokens before its own, as a summand on
        each, or by cross-attention to `prefix_length` vectors.
    affine: the expansion of the context has a bias, and the token decoder reads embeddings through an affine map.
    """

    block_length: int
    split: int
    embedder: Literal["concat", "projected"] = "projected"
    decoder: Literal["prefix", "summation", "cross_attention"] = "prefix"
    prefix_length: int = 2
    affine: bool = False

    @property
    def lead(self) -> int:
        """Positions of the token decoder before it has said a block's first token."""
        return self.prefix_length if self.decoder == "prefix" else 1

    @property
    def positions(self) -> int:
        """Positions of the token decoder for one block: what its cache holds at most."""
        return self.lead + self.block_length - 1

    @property
    def embedded(self) -> int:
        """Positions of the token decoder, of those, that begin as a token's embedding."""
        return self.positions - (self.prefix_length if self.decoder == "prefix" else 0)

    @property
    def contexts(self) -> int:
        """Vectors that a block's context is expanded to."""
        return self.block_length if self.decoder == "summation" else self.prefix_length

    def sentence(self) -> str:
        """The description in a line."""
        how = {"prefix": f"a prefix of {self.prefix_length}", "summation": "summation"}
        reads = how.get(self.decoder, f"cross-attention to {self.prefix_length}")
        return (
            f"block transformer: {self.block_length} token{'s' if self.block_length > 1 else ''} a block, embedder "
            f"{self.embedder}, layers before {self.split} over blocks, the others within one, by {reads}"
        )


@dataclass(frozen=True)
class ModelSpec:
    """A decoder: embeddings, `blocks`, final norm, head. Sizes are in numbers, not bytes.

    `block_transformer` is there where the layers work in two halves, over blocks of text and within them.
    """

    family: str
    hidden: int
    vocab: int
    layers: tuple[LayerSpec, ...]
    tied: bool
    max_positions: int | None = None
    block_transformer: BlockTransformerSpec | None = None

    def with_layers(self, layers: Sequence[LayerSpec]) -> ModelSpec:
        """The same model with other blocks."""
        return replace(self, layers=tuple(layers))

    def with_halves(self, halves: BlockTransformerSpec) -> ModelSpec:
        """The same layers as a block transformer."""
        return replace(self, block_transformer=halves)

    def check_layer(self, index: int, what: str = "layer") -> None:
        """Raise SurgeryError unless `index` names a block."""
        if not 0 <= index < len(self.layers):
            raise SurgeryError(
                f"{what} {index} is out of range: this model has layers 0 to {len(self.layers) - 1}; "
                "run `llmsurgeon inspect MODEL` to list them"
            )

    @property
    def uniform(self) -> bool:
        """True where every block has attention and FFN of one shape (window aside): the family's own form."""
        shapes = {(b.attention and b.attention.shape, b.ffn, bool(b.branches)) for b in self.layers}
        return (
            self.block_transformer is None
            and len(shapes) == 1
            and not self.layers[0].branches
            and not any(layer.own_kind for layer in self.layers)
            and None
            not in (
                self.layers[0].attention,
                self.layers[0].ffn,
            )
        )

    @property
    def attentions(self) -> tuple[AttentionSpec, ...]:
        """Every attention of the model in cache-slot order, MLGRUs included."""
        return tuple(a for layer in self.layers for a in layer.attentions)

    def state_numbers(self) -> int:
        """Numbers that the states of MLGRUs take for a sequence of any length."""
        return sum(a.width for a in self.attentions if isinstance(a, MLGRUSpec))

    def kv_numbers_per_token(self) -> int:
        """Numbers that the KV cache gains for each token (multiply by the dtype's size for bytes).

        A block transformer's gains those of the block decoder once a block; the token decoder's does not grow.
        """
        if self.block_transformer is None:
            return sum(a.kv_width for a in self.attentions)
        over_blocks = self.layers[: self.block_transformer.split]
        return -(-sum(a.kv_width for b in over_blocks for a in b.attentions) // self.block_transformer.block_length)


def to_block_configs(spec: ModelSpec) -> list[dict[str, Any]]:
    """`block_configs` of config.json. `n_heads_in_group` is heads / kv_heads; `ffn_mult` 3 * width / (2 * hidden)."""
    return [_block_config(layer, spec.hidden) for layer in spec.layers]


def _block_config(layer: LayerSpec, hidden: int) -> dict[str, Any]:
    attention, ffn = layer.attention, layer.ffn
    config: dict[str, Any] = {
        "attention": {
            "no_op": attention is None,
            "replace_with_linear": False,
            "n_heads_in_group": attention and attention.heads // attention.kv_heads,
            "num_attention_heads": attention and attention.heads,
            "num_key_value_heads": attention and attention.kv_heads,
            **({"sub_norm": True} if attention and attention.sub_norm else {}),
            **(_mlgru_config(attention) if isinstance(attention, MLGRUSpec) else {}),
        },
        "ffn": {
            "no_op": ffn is None,
            "replace_with_linear": False,
            "ffn_mult": ffn and 3 * ffn.width / (2 * hidden),
            "intermediate_size": ffn and ffn.width,
            **({"own_norm": True} if ffn and ffn.own_norm else {}),
            **({"bias": True} if ffn and ffn.bias else {}),
            **({"sub_norm": True} if ffn and ffn.sub_norm else {}),
            **(_fff_config(ffn) if isinstance(ffn, FFFSpec) else {}),
            **({"kind": "bitlinear", "projections": list(ffn.projections)} if isinstance(ffn, BitFFNSpec) else {}),
            **(
                {"kind": "moe", "num_experts": ffn.experts, "num_experts_per_tok": ffn.per_token}
                if isinstance(ffn, MoESpec)
                else {}
            ),
        },
        "parents": list(layer.parents),
    }
    if layer.branches:
        config["parallel"] = [_block_config(branch, hidden) for branch in layer.branches]
    return config


def _mlgru_config(mixer: MLGRUSpec) -> dict[str, Any]:
    biases = {"in_bias": mixer.in_bias, "out_bias": mixer.out_bias}
    return {"kind": "mlgru", "width": mixer.width, **biases, "linears": "ternary" if mixer.ternary else "float"}


def _attention_from(config: Mapping[str, Any], head_dim: int, window: int | None, rope: bool) -> AttentionSpec:
    heads = config["num_attention_heads"]
    if config.get("kind") == "mlgru":
        biases = {"in_bias": config["in_bias"], "out_bias": config["out_bias"]}
        attention = AttentionSpec(heads, heads, config["width"] // heads)
        return MLGRUSpec.instead_of(attention, **biases, ternary=config["linears"] == "ternary")
    return AttentionSpec(heads, config["num_key_value_heads"], head_dim, window, rope, config.get("sub_norm", False))


def to_block_transformer(spec: BlockTransformerSpec) -> dict[str, Any]:
    """`block_transformer` of config.json."""
    return asdict(spec)


def from_block_transformer(config: Mapping[str, Any], layers: int, hidden: int) -> BlockTransformerSpec:
    """The inverse of `to_block_transformer`, for a model of so many layers of this width.

    Raises:
        SurgeryError: keys are missing or unknown, or values cannot be.
    """
    try:
        spec = BlockTransformerSpec(**config)
        sizes = (spec.block_length, spec.split, spec.prefix_length)
        if not all(type(size) is int for size in sizes):
            raise TypeError(f"sizes {sizes}")
        if type(spec.affine) is not bool:
            raise TypeError(f"affine {spec.affine!r}")
    except TypeError as error:
        raise SurgeryError(f"config.json: block_transformer cannot be read: {error}") from error
    check_block_transformer(spec, layers, hidden)
    return spec


def check_block_transformer(spec: BlockTransformerSpec, layers: int, hidden: int) -> None:
    """Raise SurgeryError for sizes that no model can have."""
    if spec.block_length < 1 or spec.prefix_length < 1 or not 0 <= spec.split <= layers:
        raise SurgeryError(
            f"block transformer: block_length {spec.block_length}, prefix_length {spec.prefix_length} and split "
            f"{spec.split} must be at least 1, at least 1, and from 0 to the {layers} layers"
        )
    if spec.embedder == "concat" and hidden % spec.block_length:
        raise SurgeryError(
            f"block transformer: embedder concat gives each of {spec.block_length} tokens an equal part of the hidden "
            f"size {hidden}, which {spec.block_length} does not divide; use embedder projected or another block_length"
        )
    if spec.embedder not in ("concat", "projected") or spec.decoder not in ("prefix", "summation", "cross_attention"):
        raise SurgeryError(f"block transformer: unknown embedder {spec.embedder!r} or decoder {spec.decoder!r}")


def _fff_config(ffn: FFFSpec) -> dict[str, Any]:
    keys = ("form", "depth", "leaf_width", "shared", "trees", "gated", "in_bias")
    return {"kind": "fff", **{key: getattr(ffn, key) for key in keys}}


def _ffn_from(config: Mapping[str, Any]) -> FFNSpec:
    if config.get("kind", "dense") == "fff":
        neurons = {"gated": config["gated"], "in_bias": config["in_bias"]}
        if config["form"] == "leaf":
            return FFFSpec.of_leaves(config["depth"], config["leaf_width"], config["shared"], **neurons)
        return FFFSpec.of_nodes(config["depth"], config["trees"], **neurons)
    if config.get("kind") == "moe":
        return MoESpec(
            config["intermediate_size"], experts=config["num_experts"], per_token=config["num_experts_per_tok"]
        )
    if config.get("kind") == "bitlinear":
        return BitFFNSpec(config["intermediate_size"], projections=tuple(config["projections"]))
    return FFNSpec(config["intermediate_size"], *(config.get(key, False) for key in ("own_norm", "bias", "sub_norm")))


def from_block_configs(
    configs: Sequence[Mapping[str, Any]],
    head_dim: int,
    windows: Sequence[int | None],
    ropes: Sequence[bool] | None = None,
) -> tuple[LayerSpec, ...]:
    """The inverse of `to_block_configs`; `windows` and `ropes` give each block's window and rotary positions."""
    ropes = ropes or [True] * len(configs)
    return tuple(_block_from(c, head_dim, w, r) for c, w, r in zip(configs, windows, ropes, strict=True))


def _block_from(config: Mapping[str, Any], head_dim: int, window: int | None, rope: bool) -> LayerSpec:
    attention, ffn = config["attention"], config["ffn"]
    return LayerSpec(
        attention=None if attention["no_op"] else _attention_from(attention, head_dim, window, rope),
        ffn=None if ffn["no_op"] else _ffn_from(ffn),
        parents=tuple(config.get("parents") or ()),
        branches=tuple(_block_from(branch, head_dim, window, rope) for branch in config.get("parallel") or ()),
    )
