"""Costs that follow from a description: parameters, FLOPs, bytes of weights, KV cache, memory.

A layer costs what a model gains by it: the parent's stem with the layer twice, less the same with the layer once, so
that what an uneven model has once does not count as the layer's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from llmsurgeon.engines import Engine
from llmsurgeon.engines.shapes import Described, Shapes
from llmsurgeon.model.spec import LayerSpec, ModelSpec
from llmsurgeon.planning.opened import open_model
from llmsurgeon.processes.first import from_first
from llmsurgeon.searching.costs.meter import Meter, shape_of
from llmsurgeon.searching.costs.target import Target

Count = Callable[[Described, Engine], float]


class ExactMeter(Meter):
    """What `count` counts of a model, layer by layer."""

    def __init__(self, target: Target, shapes: Shapes, engine: Engine, *, unit: str, count: Count) -> None:
        super().__init__(target, shapes, engine)
        self.unit, self._count = unit, count
        self._layers: dict[LayerSpec, float] = {}

    def hurry(self, seconds: float) -> None:
        pass

    def prepare(self, layers: Iterable[LayerSpec], specs: Iterable[ModelSpec] = ()) -> None:
        for layer in layers:
            self.layer(layer)

    def preparation(self, layers: Iterable[LayerSpec], specs: Iterable[ModelSpec] = ()) -> str:
        return ""

    def learn(self, spec: ModelSpec) -> None:
        pass

    def layer(self, layer: LayerSpec) -> float:
        shape = shape_of(layer)
        if shape.empty:
            return 0.0
        if shape not in self._layers:
            once, twice = (self.shapes.beside_stem(*[layer] * count) for count in (1, 2))
            self._layers[shape] = self._whole(twice) - self._whole(once)
        return self._layers[shape]

    def rest(self, spec: ModelSpec) -> float:
        return self._whole(spec) - sum(self.layer(layer) for layer in spec.layers)

    def total(self, spec: ModelSpec) -> float:
        return self._whole(spec)

    def measured(self, path: Path, parent: Path) -> float:
        return from_first(lambda: self._measured(path))

    def _measured(self, path: Path) -> float:
        made = Shapes(open_model(str(path)))
        return self._count(made.of(made.parent.spec), self.engine)

    def _whole(self, spec: ModelSpec) -> float:
        return self._count(self.shapes.of(spec), self.engine)


def _parameters(model: Described, engine: Engine) -> float:
    return model.costs.parameters


def _flops(model: Described, engine: Engine) -> float:
    return model.costs.flops_per_token


def _size(model: Described, engine: Engine) -> float:
    return engine.weight_bytes(model)


def _kv(model: Described, engine: Engine) -> float:
    return engine.kv_bytes(model)


def _memory(model: Described, engine: Engine) -> float:
    return engine.weight_bytes(model) + engine.kv_bytes(model)


# Quantity -> the unit of its numbers, and what counts them.
COUNTS: dict[str, dict[str, Any]] = {
    "params": {"unit": "parameters", "count": _parameters},
    "flops": {"unit": "FLOPs a token", "count": _flops},
    "size": {"unit": "B", "count": _size},
    "memory": {"unit": "B", "count": _memory},
    "kv": {"unit": "B", "count": _kv},
}
