"""A dense feed-forward network (FFN), which every other kind of FFN is described like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from llmsurgeon.model.parts.base import Part

# Keys that an entry of block_configs has of every FFN; null where there is none.
FFN_KEYS = ("ffn_mult", "intermediate_size")
# Keys that it has where they are true.
SWITCHES = ("own_norm", "bias", "sub_norm")


@dataclass(frozen=True)
class FFNSpec(Part):
    """A dense feed-forward network with `width` inner channels.

    A fused FFN may need what its family's class lacks: a norm that it does not share with attention (`own_norm`), or
    biases on the projections that read it (`bias`). `sub_norm`: an RMSNorm before the output projection.
    """

    width: int
    own_norm: bool = False
    bias: bool = False
    sub_norm: bool = False

    kind: ClassVar[str] = "dense"
    # Whether its linears lie where the family's own FFN has them, so that closed forms may move them.
    as_family: ClassVar[bool] = True

    @property
    def normed(self) -> bool:
        return self.sub_norm

    @property
    def plain(self) -> bool:
        """True for a dense FFN as its family's own class has it, but for the width and a norm inside."""
        return self.kind == FFNSpec.kind and not (self.own_norm or self.bias)

    @property
    def experts(self) -> int:
        """Experts that a router chooses among."""
        return 0

    @property
    def per_token(self) -> int:
        """Experts, of these, that a token is sent to."""
        return 0

    def idle(self, matrices: Mapping[str, int], hidden: int) -> int:
        """How many of its matrices' numbers a token leaves out; less than none where it multiplies other tensors, too.

        matrices: names of the matrices inside the FFN's module -> their numbers. hidden: the model's width.
        """
        return 0

    def entry(self, hidden: int) -> dict[str, Any]:
        """What `block_configs` says of it in a model of width `hidden`: `ffn_mult` is 3 * width / (2 * hidden)."""
        sizes = dict(zip(FFN_KEYS, (3 * self.width / (2 * hidden), self.width), strict=True))
        return {**sizes, **{key: True for key in SWITCHES if getattr(self, key)}}

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> Self:
        """The inverse of `entry`."""
        return cls(entry["intermediate_size"], *(entry.get(key, False) for key in SWITCHES))

    def row(self) -> dict[str, Any]:
        """What `inspect --json` says of it."""
        return {"kind": self.kind, "width": self.width, **({"sub_norm": True} if self.sub_norm else {})}

    @property
    def label(self) -> str:
        """What `inspect` says of it."""
        return f"{self.kind} {self.width}" + (", normed" if self.sub_norm else "")
