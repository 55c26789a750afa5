"""A model as a tuple of blocks: the description every operation edits and every format writes.

A block is attention and a feed-forward network (FFN); either may be absent. Widths may differ
from block to block. `to_block_configs` writes the description in the field names that NVIDIA's
Puzzle / Nemotron-NAS checkpoints use (arXiv 2411.19146), extended where those have no word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmsurgeon.errors import SurgeryError


@dataclass(frozen=True)
class AttentionSpec:
    """Softmax attention: `heads` query heads and `kv_heads` key/value heads of `head_dim` each.

    `window` is the sliding window in tokens, None for full attention.
    """

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None

    @property
    def kv_width(self) -> int:
        """Numbers cached for each token: keys and values together."""
        return 2 * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class FFNSpec:
    """A dense feed-forward network with `width` inner channels."""

    width: int


@dataclass(frozen=True)
class BlockSpec:
    """One layer of the model. `parents` are the layers of the original model whose work it does.

    `branches`, when present, are blocks that read the same input and whose contributions add up
    (full-block parallelisation, FFN Fusion section 5); attention and ffn are then None.
    """

    attention: AttentionSpec | None
    ffn: FFNSpec | None
    parents: tuple[int, ...] = ()
    branches: tuple[BlockSpec, ...] = ()

    @property
    def attentions(self) -> tuple[AttentionSpec, ...]:
        """Every attention in the block, in cache-slot order."""
        own = () if self.attention is None else (self.attention,)
        return own + tuple(a for branch in self.branches for a in branch.attentions)

    @property
    def empty(self) -> bool:
        """True where the block only passes its input on."""
        return self.attention is None and self.ffn is None and not self.branches


@dataclass(frozen=True)
class ModelSpec:
    """A decoder: embeddings, `blocks`, final norm, head. Sizes are in numbers, not bytes."""

    family: str
    hidden: int
    vocab: int
    blocks: tuple[BlockSpec, ...]
    tied: bool
    max_positions: int | None = None

    def with_blocks(self, blocks: Sequence[BlockSpec]) -> ModelSpec:
        """The same model with other blocks."""
        return replace(self, blocks=tuple(blocks))

    def with_block(self, index: int, block: BlockSpec) -> ModelSpec:
        """The same model with block `index` replaced."""
        return self.with_blocks([block if i == index else old for i, old in enumerate(self.blocks)])

    def check_layer(self, index: int, what: str = "layer") -> None:
        """Raise SurgeryError unless `index` names a block."""
        if not 0 <= index < len(self.blocks):
            raise SurgeryError(
                f"{what} {index} is out of range: this model has layers 0 to {len(self.blocks) - 1}; "
                "run `llmsurgeon inspect MODEL` to list them"
            )

    @property
    def uniform(self) -> bool:
        """True where every block has attention and FFN of one shape (window aside): the family's own form."""
        shapes = {(b.attention and replace(b.attention, window=None), b.ffn, bool(b.branches)) for b in self.blocks}
        return (
            len(shapes) == 1
            and not self.blocks[0].branches
            and None
            not in (
                self.blocks[0].attention,
                self.blocks[0].ffn,
            )
        )

    @property
    def attentions(self) -> tuple[AttentionSpec, ...]:
        """Every attention of the model in cache-slot order."""
        return tuple(a for block in self.blocks for a in block.attentions)

    def kv_numbers_per_token(self) -> int:
        """Numbers that the KV cache gains for each token (multiply by the dtype's size for bytes)."""
        return sum(a.kv_width for a in self.attentions)


def to_block_configs(spec: ModelSpec) -> list[dict[str, Any]]:
    """`block_configs` of config.json. `n_heads_in_group` is heads / kv_heads; `ffn_mult` 3 * width / (2 * hidden)."""
    return [_block_config(block, spec.hidden) for block in spec.blocks]


def _block_config(block: BlockSpec, hidden: int) -> dict[str, Any]:
    attention, ffn = block.attention, block.ffn
    config: dict[str, Any] = {
        "attention": {
            "no_op": attention is None,
            "replace_with_linear": False,
            "n_heads_in_group": attention and attention.heads // attention.kv_heads,
            "num_attention_heads": attention and attention.heads,
            "num_key_value_heads": attention and attention.kv_heads,
        },
        "ffn": {
            "no_op": ffn is None,
            "replace_with_linear": False,
            "ffn_mult": ffn and 3 * ffn.width / (2 * hidden),
            "intermediate_size": ffn and ffn.width,
        },
        "parents": list(block.parents),
    }
    if block.branches:
        config["parallel"] = [_block_config(branch, hidden) for branch in block.branches]
    return config


def from_block_configs(
    configs: Sequence[Mapping[str, Any]], head_dim: int, windows: Sequence[int | None]
) -> tuple[BlockSpec, ...]:
    """The inverse of `to_block_configs`; `windows` gives each block's sliding window."""
    return tuple(_block_from(c, head_dim, w) for c, w in zip(configs, windows, strict=True))


def _block_from(config: Mapping[str, Any], head_dim: int, window: int | None) -> BlockSpec:
    attention, ffn = config["attention"], config["ffn"]
    return BlockSpec(
        attention=None
        if attention["no_op"]
        else AttentionSpec(attention["num_attention_heads"], attention["num_key_value_heads"], head_dim, window),
        ffn=None if ffn["no_op"] else FFNSpec(ffn["intermediate_size"]),
        parents=tuple(config.get("parents", ())),
        branches=tuple(_block_from(branch, head_dim, window) for branch in config.get("parallel", ())),
    )
