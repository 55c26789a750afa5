"""Layer numbers as people write them: 7, "66-115", [4, 7, "17-19"], and runs of neighbouring layers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

from llmsurgeon.errors import SurgeryError

# Far above any model, and low enough that a mistyped range cannot fill the memory.
MAX_LAYER = 9_999


class LayersError(SurgeryError, ValueError):
    """Layers that cannot be read. Also a ValueError, so pydantic reports it at the recipe's line."""


def parse_layers(value: Any) -> tuple[int, ...]:
    """Layer numbers in ascending order from an int, a string ("4, 7-9") or a list of either.

    Raises:
        LayersError: something is no layer number or range, or a layer is named twice.
    """
    layers: set[int] = set()
    for layer in layers_as_written(value):
        if layer in layers:
            raise LayersError(f"layer {layer} is named twice")
        layers.add(layer)
    if not layers:
        raise LayersError('expected at least one layer, such as [4, 7] or "66-115"')
    return tuple(sorted(layers))


def layers_as_written(value: Any) -> list[int]:
    """Layer numbers as `parse_layers` reads them, in the order in which they are written.

    Raises:
        LayersError: something is no layer number or range.
    """
    parts = value if isinstance(value, list | tuple) else [value]
    return [layer for part in parts for layer in _expand(part)]


def parse_runs(value: Any) -> tuple[tuple[int, ...], ...]:
    """Runs in ascending order from "66-73, 74-85", from ["66-73", ...] or from lists of every layer.

    Raises:
        LayersError: a run is shorter than two layers, shares a layer with another, or is a list of two
            layers that are not neighbours.
    """
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    if not isinstance(value, list | tuple) or not value:
        raise LayersError(f'expected runs such as ["66-73", "74-85"], got {value!r}')
    if all(isinstance(part, int) for part in value):
        written = ", ".join(map(str, value))
        raise LayersError(f'expected a list of runs, got a list of layers; one run is [[{written}]] or ["a-b"]')
    runs = sorted(_parse_run(part) for part in value)
    for before, after in pairwise(runs):
        if after[0] <= before[-1]:
            raise LayersError(f"runs {write_run(before)} and {write_run(after)} overlap; each layer may be in one run")
    return tuple(runs)


def write_run(run: tuple[int, ...]) -> str:
    """A run as `parse_runs` reads it back: "66-73", or "4, 6" where an earlier step removed the layers between."""
    whole = run[-1] - run[0] + 1 == len(run)
    return f"{run[0]}-{run[-1]}" if whole else ", ".join(map(str, run))


def _write_runs(runs: Any) -> Any:
    # A field may hold a word such as "auto" in place of runs.
    return [write_run(run) for run in runs] if isinstance(runs, tuple) else runs


# Field types for operations: read every way of writing layers, hold plain tuples.
LayerList = Annotated[tuple[int, ...], BeforeValidator(parse_layers)]
RunList = Annotated[
    tuple[tuple[int, ...], ...], BeforeValidator(parse_runs), PlainSerializer(_write_runs, when_used="json")
]


def _parse_run(value: Any) -> tuple[int, ...]:
    layers = parse_layers(value)
    if len(layers) < 2:
        raise LayersError(f"run {value!r} has one layer; a run needs at least two")
    if isinstance(value, list) and len(value) == 2 == len(layers) and layers[1] != layers[0] + 1:
        # Written in a recipe, two numbers look like the ends of a run, and would silently fuse two far layers.
        raise LayersError(
            f"run {list(value)} names two layers that are not neighbours; "
            f'for all of {layers[0]} to {layers[1]} write "{layers[0]}-{layers[1]}"'
        )
    return layers


def _expand(part: Any) -> list[int]:
    if isinstance(part, int) and not isinstance(part, bool) and 0 <= part <= MAX_LAYER:
        return [part]
    if isinstance(part, str):
        return [layer for piece in part.split(",") for layer in _expand_text(piece)]
    raise LayersError(f'expected a layer number from 0 or a range such as "66-115", got {part!r}')


def _expand_text(text: str) -> range:
    match = re.fullmatch(r"\s*(\d{1,5})(?:\s*-\s*(\d{1,5}))?\s*", text)
    if not match:
        raise LayersError(f'expected a layer number from 0 or a range such as "66-115", got {text!r}')
    first, last = int(match[1]), int(match[2] or match[1])
    if first > last:
        raise LayersError(f"range {text.strip()!r} runs backwards; did you mean '{last}-{first}'?")
    if last > MAX_LAYER:
        raise LayersError(f"layer {last} is too large: layers go up to {MAX_LAYER}")
    return range(first, last + 1)


def write_ranges(layers: Sequence[int], dash: str = "-") -> str:
    """4, 7, 8, 9 -> "4, 7-9"; two neighbours stay apart."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}{dash}{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
