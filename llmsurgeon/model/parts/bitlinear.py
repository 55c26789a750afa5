"""A dense FFN of BitLinears, as beside a ternary MLGRU (BitNet b1.58, arXiv 2402.17764; arXiv 2406.02528)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from llmsurgeon.model.parts.base import Touch
from llmsurgeon.model.parts.dense import FFNSpec


@dataclass(frozen=True)
class BitFFNSpec(FFNSpec):
    """A dense FFN whose `projections` are BitLinears: ternary weights, 8-bit activations, a norm of its own each."""

    projections: tuple[str, ...] = ()

    kind: ClassVar[str] = "bitlinear"
    own_kind: ClassVar[str | None] = "has BitLinears in its FFN"
    # Each of its linears norms and rounds what it reads; the mixer beside it is an MLGRU, which has no key/value heads.
    forbids: ClassVar[frozenset[Touch]] = frozenset(
        {
            Touch.REPLACES_FFN,
            Touch.REWRITES_HEADS,
            Touch.REWRITES_NEURONS,
            Touch.REWRITES_LINEARS,
            Touch.RECONNECTS_LAYERS,
        }
    )
    in_order: ClassVar[str] = "cut first, matmulfree comes last"

    @property
    def bit_linears(self) -> bool:
        return True

    def entry(self, hidden: int) -> dict[str, Any]:
        return {**super().entry(hidden), "kind": self.kind, "projections": list(self.projections)}

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> Self:
        return cls(entry["intermediate_size"], projections=tuple(entry["projections"]))
