"""A fast feedforward network: neurons in trees, of which a token visits one path (arXiv 2308.14711, 2311.10770)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from llmsurgeon.model.parts.base import Touch
from llmsurgeon.model.parts.dense import FFNSpec


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

    kind: ClassVar[str] = "fff"
    as_family: ClassVar[bool] = False
    own_kind: ClassVar[str | None] = "has a fast feedforward network"
    # Its neurons lie in groups that a tree chooses from, under names of its own.
    forbids: ClassVar[frozenset[Touch]] = frozenset(
        {Touch.REMOVES_FFN, Touch.REWRITES_NEURONS, Touch.REWRITES_LINEARS, Touch.RECONNECTS_LAYERS}
    )
    in_order: ClassVar[str] = "cut first, fff comes last"

    @classmethod
    def of_leaves(cls, depth: int, leaf_width: int, shared: int = 0, **neurons: bool) -> Self:
        """The leaf form of these sizes; `neurons` says whether they are gated and have biases on what they read."""
        width = shared + 2**depth * leaf_width
        return cls(width, form="leaf", depth=depth, leaf_width=leaf_width, shared=shared, **neurons)

    @classmethod
    def of_nodes(cls, depth: int, trees: int, **neurons: bool) -> Self:
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

    def idle(self, matrices: Mapping[str, int], hidden: int) -> int:
        """All but the rows that are visited, some of which lie in tensors that are no matrices."""
        stored = sum(numbers for name, numbers in matrices.items() if "." not in name)
        return stored - self.rows * hidden

    def entry(self, hidden: int) -> dict[str, Any]:
        keys = ("kind", "form", "depth", "leaf_width", "shared", "trees", "gated", "in_bias")
        return {**super().entry(hidden), **{key: getattr(self, key) for key in keys}}

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> Self:
        neurons = {key: entry[key] for key in ("gated", "in_bias")}
        if entry["form"] == "leaf":
            return cls.of_leaves(entry["depth"], entry["leaf_width"], entry["shared"], **neurons)
        return cls.of_nodes(entry["depth"], entry["trees"], **neurons)

    def row(self) -> dict[str, Any]:
        names = ("leaf_width", "shared") if self.form == "leaf" else ("trees",)
        shape = {name: getattr(self, name) for name in ("form", "depth", *names, "active", "words")}
        return {"kind": self.kind, "width": self.width, **shape}

    @property
    def label(self) -> str:
        return f"{self.kind} {self.width}: {self.words}; {self.active} a token"
