"""What a walk may leave out of a model, or run in parallel."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """The parent with parts left out or run in parallel; layers are the parent's.

    runs: layers of one run all feed their FFN with what the run's first FFN reads.
    """

    no_attention: frozenset[int] = frozenset()
    no_ffn: frozenset[int] = frozenset()
    runs: tuple[tuple[int, ...], ...] = ()

    def run_start(self, layer: int) -> int | None:
        """First layer of the run that `layer` belongs to, None outside runs."""
        return next((run[0] for run in self.runs if layer in run), None)

    def first_difference(self, other: Variant, layers: int) -> int:
        """The first layer that the two variants compute differently (`layers` when they are equal)."""
        return next((i for i in range(layers) if self._at(i) != other._at(i)), layers)

    def _at(self, layer: int) -> tuple[bool, bool, int]:
        # A run's first layer computes what it would outside of runs.
        run_start = self.run_start(layer)
        return layer in self.no_attention, layer in self.no_ffn, layer if run_start is None else run_start
