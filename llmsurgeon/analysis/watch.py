"""Layers of the parent watched one at a time, while one walk over calibration text passes through them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal, Protocol, TypeVar

from torch import Tensor, nn

from llmsurgeon.processes.share import Share
from llmsurgeon.progress import Progress
from llmsurgeon.walk.runner import LayerRunner
from llmsurgeon.walk.variants import Variant
from llmsurgeon.walk.walk import Course, Parts, walk

Found = TypeVar("Found")
Told = TypeVar("Told", covariant=True)


class Watcher(Protocol[Told]):
    """Watches one loaded layer."""

    def see(self, part: slice, parts: Parts) -> None:
        """Some sequences have gone through the layer."""

    def found(self, share: Share) -> Told:
        """What came of it; the walk has left the layer. `share`: of the sequences, what this process has seen."""


def watch(
    runner: LayerRunner,
    tokens: Tensor,
    watchers: Callable[[int, nn.Module], Watcher[Found]],
    layers: Collection[int],
    title: str,
    batch: int = 4,
    part: Literal["attention", "ffn"] = "ffn",
) -> dict[int, Found]:
    """Layer -> what its watcher found, of those of `layers` that have a `part` of their own.

    Args:
        tokens: [S, T].
        watchers: makes one for a layer whose weights are there: (layer, module).
    """
    share = Share.of(len(tokens))
    found: dict[int, Found] = {}
    current: dict[int, Watcher[Found]] = {}
    has = runner.feeds_forward if part == "ffn" else runner.attends
    with Progress(title, len(layers), "layers") as progress:

        def leave() -> None:
            while current:
                layer, watcher = current.popitem()
                found[layer] = watcher.found(share)
                progress.advance()

        def enter(layer: int, module: nn.Module) -> None:
            leave()
            if layer in layers and has(layer):
                current[layer] = watchers(layer, module)

        def observe(layer: int, rows: slice, variant: int, mine: Parts, base: Parts) -> None:
            if layer in current:
                current[layer].see(rows, mine)

        walk(runner, share.mine(tokens), [Variant()], observe, batch=batch, course=Course(enter=enter))
        leave()
    return found
