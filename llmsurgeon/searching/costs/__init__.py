"""What layers cost, and whole models: the side of a search that has nothing to do with quality.

A `Target` bounds a quantity, a `Meter` counts it in a model's layers, an `Engine` is what will run the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from llmsurgeon.engines import ENGINES, Engine
from llmsurgeon.engines.shapes import Shapes
from llmsurgeon.errors import SurgeryError
from llmsurgeon.planning.opened import DescribedModel
from llmsurgeon.searching.costs.exact import COUNTS, ExactMeter
from llmsurgeon.searching.costs.measured import SECONDS, SecondsMeter
from llmsurgeon.searching.costs.meter import Meter
from llmsurgeon.searching.costs.target import Target, parse_targets

# Quantity of a target -> what makes its meter.
METERS: dict[str, Callable[[Target, Shapes, Engine], Meter]] = {
    **{name: partial(SecondsMeter, **how) for name, how in SECONDS.items()},
    **{name: partial(ExactMeter, **how) for name, how in COUNTS.items()},
}


def meters(targets: Sequence[Target], engine: Engine | None, parent: DescribedModel) -> list[Meter]:
    """A meter of each target, for models that are made of `parent`.

    Raises:
        SurgeryError: a speed without an engine, or an engine that cannot run the parent.
    """
    for target in targets:
        if engine is None and target.quantity.speed:
            raise SurgeryError(
                f"target {target.written}: name what is to be that fast, such as --engine llama.cpp:q8_0"
            )
    shapes, engine = Shapes(parent), engine or Engine.parse(None)
    stem = shapes.stem
    if reason := engine.misfit(shapes, stem):
        raise SurgeryError(f"{parent.name}: {engine.written} cannot run it: {reason}")
    return [METERS[target.name](target, shapes, engine) for target in targets]


__all__ = ["ENGINES", "METERS", "Engine", "Meter", "Shapes", "Target", "meters", "parse_targets"]
