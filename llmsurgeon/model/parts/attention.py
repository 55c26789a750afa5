"""Softmax attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

from llmsurgeon.model.parts.base import Part

# Keys that an entry of block_configs has of every attention; null where there is none.
ATTENTION_KEYS = ("n_heads_in_group", "num_attention_heads", "num_key_value_heads")


@dataclass(frozen=True)
class AttentionSpec(Part):
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

    kind: ClassVar[str] = "softmax"
    # Whether it looks back at what earlier tokens left in the KV cache.
    looks_back: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, int, int]:
        """What the sizes of its tensors follow from: heads, key/value heads, head width."""
        return self.heads, self.kv_heads, self.head_dim

    @property
    def kv_width(self) -> int:
        """Numbers cached for each token: keys and values together."""
        return 2 * self.kv_heads * self.head_dim

    @property
    def state_width(self) -> int:
        """Numbers kept for a sequence of any length."""
        return 0

    @property
    def normed(self) -> bool:
        return self.sub_norm

    def entry(self) -> dict[str, Any]:
        """What `block_configs` says of it. `n_heads_in_group` is heads / kv_heads."""
        sizes = dict(zip(ATTENTION_KEYS, (self.heads // self.kv_heads, self.heads, self.kv_heads), strict=True))
        return {**sizes, **({"sub_norm": True} if self.sub_norm else {})}

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any], head_dim: int, window: int | None, rope: bool) -> Self:
        """The inverse of `entry`; what is not in an entry stands elsewhere in config.json."""
        heads, kv_heads = entry["num_attention_heads"], entry["num_key_value_heads"]
        return cls(heads, kv_heads, head_dim, window, rope, entry.get("sub_norm", False))

    def row(self) -> dict[str, Any]:
        """What `inspect --json` says of it."""
        return asdict(self)

    @property
    def label(self) -> str:
        """What `inspect` says of it."""
        window = f", window {self.window}" if self.window else ""
        normed = ", normed" if self.sub_norm else ""
        return f"{self.heads} heads, {self.kv_heads} KV, width {self.head_dim}{window}{normed}"
