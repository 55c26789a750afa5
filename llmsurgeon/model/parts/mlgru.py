"""MLGRU: a gated recurrence in the place of an attention, as in the MatMul-free language model (arXiv 2406.02528)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from llmsurgeon.model.parts.attention import AttentionSpec
from llmsurgeon.model.parts.base import Touch


@dataclass(frozen=True)
class MLGRUSpec(AttentionSpec):
    """An MLGRU in the place of an attention: a gated recurrence with a state of one size.

    The state has a channel for each of the attention's query heads' own; `in_bias` and `out_bias` say which projections
    have biases beside the forget gate's. `ternary`: its projections are BitLinears.
    """

    in_bias: bool = False
    out_bias: bool = False
    ternary: bool = False

    kind: ClassVar[str] = "mlgru"
    looks_back: ClassVar[bool] = False
    own_kind: ClassVar[str | None] = "has an MLGRU in the place of its attention"
    # It has no key/value heads, no mask and no positions.
    forbids: ClassVar[frozenset[Touch]] = frozenset({Touch.REWRITES_HEADS, Touch.RECONNECTS_LAYERS})
    in_order: ClassVar[str] = "cut first, matmulfree comes last"

    @classmethod
    def instead_of(cls, attention: AttentionSpec, **projections: bool) -> Self:
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

    @property
    def state_width(self) -> int:
        return self.width

    @property
    def bit_linears(self) -> bool:
        return self.ternary

    @property
    def linears(self) -> str:
        """What its projections are, in a word."""
        return "ternary" if self.ternary else "float"

    def entry(self) -> dict[str, Any]:
        own = {"kind": self.kind, "width": self.width, "in_bias": self.in_bias, "out_bias": self.out_bias}
        return {**super().entry(), **own, "linears": self.linears}

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any], head_dim: int, window: int | None, rope: bool) -> Self:
        """The inverse of `entry`, which says all of it: its channels need not be as wide as the model's heads."""
        heads, biases = entry["num_attention_heads"], {key: entry[key] for key in ("in_bias", "out_bias")}
        attention = AttentionSpec(heads, heads, entry["width"] // heads)
        return cls.instead_of(attention, **biases, ternary=entry["linears"] == "ternary")

    def row(self) -> dict[str, Any]:
        return {"kind": self.kind, "width": self.width, "linears": self.linears}

    @property
    def label(self) -> str:
        return f"MLGRU {self.width}" + (", ternary" if self.ternary else "")
