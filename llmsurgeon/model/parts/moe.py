"""A mixture of experts: several FFNs, of which a router chooses some for each token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from llmsurgeon.model.parts.dense import FFNSpec


@dataclass(frozen=True)
class MoESpec(FFNSpec):
    """A mixture of `experts` FFNs of `width` channels each, of which a router chooses `per_token` for each token."""

    experts: int = 0
    per_token: int = 0

    kind: ClassVar[str] = "moe"

    def idle(self, matrices: Mapping[str, int], hidden: int) -> int:
        """The experts, all alike, that are not chosen."""
        stored = sum(numbers for name, numbers in matrices.items() if name.startswith("experts."))
        return stored // self.experts * (self.experts - self.per_token)

    def entry(self, hidden: int) -> dict[str, Any]:
        own = {"kind": self.kind, "num_experts": self.experts, "num_experts_per_tok": self.per_token}
        return {**super().entry(hidden), **own}

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> Self:
        sizes = {"experts": entry["num_experts"], "per_token": entry["num_experts_per_tok"]}
        return cls(entry["intermediate_size"], **sizes)

    def row(self) -> dict[str, Any]:
        return {"kind": self.kind, "width": self.width, "experts": self.experts, "per_token": self.per_token}

    @property
    def label(self) -> str:
        return f"{self.kind} {self.width} x {self.experts}, {self.per_token} a token"
