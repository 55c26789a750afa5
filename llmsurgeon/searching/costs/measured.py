"""Seconds that layers take in the engine that will serve: of a decode step, or of a prompt.

Models near the parent's size are timed in turn with it (`design`), each a row of counts of parts (`columns`), and the
parts' times follow (`fit`): the differencing of Puzzle (arXiv 2411.19146, section 4), inside a model of full size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from math import hypot
from pathlib import Path
from statistics import median
from typing import Any

from llmsurgeon.engines import Engine
from llmsurgeon.engines.shapes import Shapes
from llmsurgeon.errors import SurgeryError
from llmsurgeon.evaluation.speed import Speedup
from llmsurgeon.model.spec import LayerSpec, ModelSpec
from llmsurgeon.processes.first import from_first
from llmsurgeon.progress import spoken
from llmsurgeon.searching.costs.columns import REST, ROWS, Columns
from llmsurgeon.searching.costs.design import base_of, design
from llmsurgeon.searching.costs.fit import Fitted, fit
from llmsurgeon.searching.costs.meter import Meter, shape_of
from llmsurgeon.searching.costs.target import Target
from llmsurgeon.searching.costs.timed import MOST_ROUNDS, STEPS, Timings

ROUNDS = 9  # of a written model's bench
UNLIKE = 0.02  # by what share a model may miss its parts' sum for all that models unlike it tell
REST_SHARE = 0.1  # of the base's time, before anything is measured
SECONDS_A_BYTE = 1e-10  # of weights read, to say beforehand how long timing takes


class SecondsMeter(Meter):
    """Seconds of one decode step of the whole batch, or of one prefill of the context."""

    exact = False

    def __init__(self, target: Target, shapes: Shapes, engine: Engine, *, unit: str) -> None:
        super().__init__(target, shapes, engine)
        if target.name == "decode" and shapes.parent.family.encoder:
            raise SurgeryError(f"target {target.written}: an encoder decodes nothing; ask for prefill instead")
        self.unit = unit
        self._layers: dict[LayerSpec, None] = dict.fromkeys(map(shape_of, self.parent.layers))
        self._vocabs: set[int] = set()
        self._learnt: set[ModelSpec] = set()
        self._found: tuple[Columns, Fitted] | None = None

    @cached_property
    def timings(self) -> Timings:
        """The models that were timed, and those that an earlier run has timed."""
        base = base_of(self.parent, lambda spec: self.engine.weight_bytes(self.shapes.of(spec)))
        return Timings(self.shapes, self.engine, base, self.target.name)

    def hurry(self, seconds: float) -> None:
        self.timings.seconds = seconds

    def prepare(self, layers: Iterable[LayerSpec], specs: Iterable[ModelSpec] = ()) -> None:
        asked = self._asked(layers, specs)
        if self._found is None or asked != (self._layers, self._vocabs):
            self._layers, self._vocabs = asked
            self._find()

    def preparation(self, layers: Iterable[LayerSpec], specs: Iterable[ModelSpec] = ()) -> str:
        missing = self.timings.missing(self._designed(*self._asked(layers, specs)))
        if not missing:
            return ""
        weight = self.engine.weight_bytes(self.shapes.of(self.timings.base))
        # A prompt's tokens are multiplied together, about eight for the time of one that is read from memory.
        reading = self.engine.setting.context / 8
        steps = STEPS if self.target.name == "decode" else reading
        # The base beside each, and on a busy machine most of the rounds.
        rounds = 1.5 * MOST_ROUNDS[self.target.name]
        seconds = len(missing) * (rounds * steps + reading) * weight * SECONDS_A_BYTE
        return f"{len(missing)} models of random weights to be timed for {self.target.name}, about {spoken(seconds)}"

    def learn(self, spec: ModelSpec) -> None:
        # A model of which only a part would be held in memory says nothing of its parts that the others did not.
        if len(self.timings.base.layers) == len(self.parent.layers):
            self.prepare(spec.layers, (spec,))
            self._learnt |= self.timings.of([spec]).keys()
            self._find()

    def layer(self, layer: LayerSpec) -> float:
        shape = shape_of(layer)
        if shape.empty:
            return 0.0
        columns, fitted = self._fitted(shape)
        return self._base_seconds * fitted.time(columns.of_layer(shape))

    def rest(self, spec: ModelSpec) -> float:
        columns, fitted = self._fitted()
        row = columns.row(spec.with_layers(()))
        return self._base_seconds * fitted.time(row)

    def half(self, spec: ModelSpec) -> float:
        """Half of the 95 % interval of a model's cost, as far as it comes from the noise of timing."""
        columns, fitted = self._fitted(*map(shape_of, spec.layers))
        return self._base_seconds * fitted.half(columns.row(spec))

    def of_amount(self, amount: float) -> float:
        per_round = self.engine.setting.batch * (1 if self.target.name == "decode" else self.engine.setting.context)
        return per_round / amount

    def amount(self, total: float) -> str:
        return f"{1000 * total:.3g} ms {self.unit}, {self.of_amount(total):,.3g} tokens a second"

    def speedup(self, path: Path, parent: Path) -> Speedup:
        """How much faster a written model is than the parent, timed in turn in the engine."""
        made = from_first(lambda: self.engine.bench(path, parent, ROUNDS))
        found = made.decode_speedup if self.target.name == "decode" else made.prefill_speedup
        assert found
        return found

    def measured(self, path: Path, parent: Path) -> float:
        return self.parent_total / self.speedup(path, parent).median

    def _asked(self, layers: Iterable[LayerSpec], specs: Iterable[ModelSpec]) -> tuple[dict[LayerSpec, None], set[int]]:
        shapes = (shape_of(layer) for layer in layers)
        vocabs = {spec.vocab for spec in specs} - {self.parent.vocab}
        return self._layers | dict.fromkeys(shape for shape in shapes if not shape.empty), self._vocabs | vocabs

    def _designed(self, layers: Iterable[LayerSpec], vocabs: set[int]) -> list[ModelSpec]:
        columns = Columns.of(layers, self.parent)

        def fits(spec: ModelSpec) -> bool:
            return self.engine.kind.misfit(self.shapes, spec) is None

        return design(self.timings.base, columns, vocabs, fits)

    def _fitted(self, *shapes: LayerSpec) -> tuple[Columns, Fitted]:
        """The times of all parts, those of these layers among them."""
        if self._found is None or any(shape not in self._layers for shape in shapes):
            self.prepare(shapes)
        assert self._found
        return self._found

    def _find(self) -> None:
        columns = Columns.of(self._layers, self.parent)
        self.timings.of(self._designed(self._layers, self._vocabs))
        rows, ratios = [columns.row(self.timings.base)], [(1.0, 0.0)]
        for spec, ratio in self.timings.known.items():
            rows.append(columns.row(spec))
            far = UNLIKE if self._learnt and spec not in self._learnt else 0.0
            ratios.append((ratio.value, hypot(ratio.half, far * ratio.value)))
        self._found = columns, fit(rows, ratios, self._prior(columns))
        self.__dict__.pop("parent_total", None)

    @property
    def _base_seconds(self) -> float:
        return median(ratio.base_seconds for ratio in self.timings.known.values())

    def _prior(self, columns: Columns) -> dict[Any, float]:
        """Every column's share of the base's time by what it multiplies."""

        def flops(*layers: LayerSpec) -> float:
            return self.shapes.of(self.shapes.beside_stem(*layers)).costs.flops_per_token

        stem = self.shapes.stem
        none = flops()
        whole = self.shapes.of(self.timings.base).costs.flops_per_token
        scale = (1 - REST_SHARE) / whole
        found: dict[Any, float] = {REST: REST_SHARE, ROWS: scale * self.parent.vocab * self.parent.hidden}
        found |= {part: scale * (flops(replace(stem, attention=part, ffn=None)) - none) for part in columns.attentions}
        found |= {part: scale * (flops(replace(stem, attention=None, ffn=part)) - none) for part in columns.ffns}
        return found


# Quantity -> the unit of its seconds.
SECONDS: dict[str, dict[str, Any]] = {"decode": {"unit": "a step"}, "prefill": {"unit": "a prompt"}}
