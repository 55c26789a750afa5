"""`ternary` with codes that compensate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmsurgeon.healing.batches import Batches
from llmsurgeon.healing.healers.base import HealingContext
from llmsurgeon.healing.store import LayerStore
from llmsurgeon.healing.ternary.context import TernaryContext
from llmsurgeon.healing.ternary.linears import TernaryLinear, summary
from llmsurgeon.healing.ternary.ternarise import ternarise
from llmsurgeon.operations import Subject
from llmsurgeon.operations.ternary import Ternary
from llmsurgeon.walk.runner import LayerRunner


@dataclass(frozen=True)
class Ternarised:
    """The linears that became ternary."""

    files: Mapping[str, Path]
    linears: tuple[TernaryLinear, ...]

    def behind(self, earlier: Ternarised) -> Ternarised:
        """With the linears of an earlier step."""
        return Ternarised(self.files, (*earlier.linears, *self.linears))

    def record(self) -> list[dict[str, Any]]:
        """An entry for each linear."""
        return [linear.to_dict() for linear in self.linears]

    def notes(self) -> list[str]:
        """One line, where there are any."""
        return [summary(self.linears)] if self.linears else []

    def lines(self) -> list[str]:
        """As on the card."""
        return self.notes()

    def pages(self, name: str) -> Mapping[str, str]:
        """None."""
        return {}


def ternarised(context: HealingContext, step: Ternary) -> Ternarised:
    """The student with ternary linears, each by what it reads behind those before it."""
    subject = Subject(context.spec, context.family, frozenset(context.weights))
    made = ternarise(
        TernaryContext(
            LayerRunner(context.config, context.weights, context.parent.dtype, context.device),
            step.chosen(subject),
            Batches.of(context.windows, context.held_out, context.batch),
            step.grid,
            step.ridge if step.align else (),
            LayerStore(context.folder),
            _new_norms(context) if step.sub_norm else {},
        )
    )
    return Ternarised(made.files, made.linears)


def _new_norms(context: HealingContext) -> dict[int, list[str]]:
    """Layer -> output projections inside it with a norm that the parent does not have."""
    before, found = context.parent_spec.layers, {}
    for index, layer in enumerate(context.spec.layers):
        new = set(layer.sub_normed) - set(before[layer.parents[0]].sub_normed)
        found[index] = [path for path, (part, _) in context.family.sub_norms.items() if part in new]
    return found
