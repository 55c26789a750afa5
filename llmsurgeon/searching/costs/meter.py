"""What a meter is: what a model's layers cost in the one quantity that a target bounds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from llmsurgeon.engines import Engine
from llmsurgeon.engines.shapes import Shapes
from llmsurgeon.errors import SurgeryError
from llmsurgeon.model.costs import human
from llmsurgeon.model.spec import LayerSpec, ModelSpec
from llmsurgeon.searching.costs.target import Target


class Meter(ABC):
    """Costs of layers and of whole models in one quantity, of which less is better: bytes, seconds, parameters.

    A model's cost is that of its rest (embedding, head, what a step costs whatever the layers) and its layers' sum.

    exact: whether it follows from the description; else it was measured.
    unit: what the numbers are in.
    """

    exact: ClassVar[bool] = True
    unit: str

    def __init__(self, target: Target, shapes: Shapes, engine: Engine) -> None:
        self.target, self.shapes, self.engine = target, shapes, engine
        self.parent = shapes.parent.spec

    @property
    def grain(self) -> int:
        """Widths of FFNs that the engine runs well are multiples of it."""
        return self.engine.grain

    def misfit(self, layer: LayerSpec, first: bool = False) -> str | None:
        """Why the engine cannot run a model that has such a layer (as its first one), None where it can."""
        return self.engine.misfit(self.shapes, layer, first)

    @abstractmethod
    def hurry(self, seconds: float) -> None:
        """Let `prepare` take no longer than about so many seconds, and be less sure of what it finds."""

    @abstractmethod
    def prepare(self, layers: Iterable[LayerSpec], specs: Iterable[ModelSpec] = ()) -> None:
        """Find the costs of all these layers, and of the rests of these models, at once."""

    @abstractmethod
    def preparation(self, layers: Iterable[LayerSpec], specs: Iterable[ModelSpec] = ()) -> str:
        """What `prepare` has to do, and about how long it takes; nothing where it takes no time."""

    @abstractmethod
    def layer(self, layer: LayerSpec) -> float:
        """Cost of one layer, 0 of an empty one."""

    @abstractmethod
    def rest(self, spec: ModelSpec) -> float:
        """Cost of what is not in the layers."""

    @abstractmethod
    def learn(self, spec: ModelSpec) -> None:
        """Measure a model of this very shape, and correct the costs of parts by it; nothing where they are exact."""

    def total(self, spec: ModelSpec) -> float:
        """Cost of a model."""
        return self.rest(spec) + sum(self.layer(layer) for layer in spec.layers)

    @cached_property
    def parent_total(self) -> float:
        """Cost of the model that is searched."""
        return self.total(self.parent)

    def budget(self) -> float:
        """The most that a model may cost.

        Raises:
            SurgeryError: the parent costs no more.
        """
        bound, parent = self.target.bound, self.parent_total
        if self.target.relative:
            return parent / bound if self.target.quantity.speed else parent * bound
        most = self.of_amount(bound)
        if most >= parent:
            raise SurgeryError(
                f"target {self.target.written}: the model is there already, at {self.say(parent)}; ask for less"
            )
        return most

    def of_amount(self, amount: float) -> float:
        """The cost at which an absolute target is just met."""
        return amount

    def ratio(self, total: float) -> float:
        """A cost as targets count it: a speedup, or what is left of the parent."""
        return self.parent_total / total if self.target.quantity.speed else total / self.parent_total

    @abstractmethod
    def measured(self, path: Path, parent: Path) -> float:
        """Cost of a checkpoint that was written, measured anew beside the parent's where it is not exact.

        A measured one is scaled so that the parent's comes out as `parent_total`.
        """

    def say(self, total: float) -> str:
        """A cost in words, with its ratio to the parent's."""
        return f"{self.ratio(total):.3g}x {self.target.name} ({self.amount(total)})"

    def amount(self, total: float) -> str:
        """A cost in words."""
        return human(total, self.unit) if self.unit == "B" else f"{human(total)} {self.unit}"


def shape_of(layer: LayerSpec) -> LayerSpec:
    """The layer without what it was made of: what two layers of one cost share."""
    return replace(layer, parents=(), branches=tuple(shape_of(branch) for branch in layer.branches))
