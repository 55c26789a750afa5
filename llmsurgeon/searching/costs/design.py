"""Which models are timed, so that the time of each part follows.

All of them are near the parent's size: a small model would lie in a cache that the whole one does not fit, and what is
extrapolated from it carries its noise many times over. In each, one part of every other layer differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from llmsurgeon.model.parts import AttentionSpec, FFNSpec
from llmsurgeon.model.spec import LayerSpec, ModelSpec
from llmsurgeon.searching.costs.columns import Columns

# Of the timed models' weights: enough to be far beyond any cache, little enough to have several in memory.
MOST_BYTES = 1_200_000_000
FEWEST_LAYERS = 4
Fits = Callable[[ModelSpec], bool]


def base_of(parent: ModelSpec, weight_bytes: Callable[[ModelSpec], int]) -> ModelSpec:
    """The parent, or as many of its first layers as stay under MOST_BYTES, and FEWEST_LAYERS at least."""
    layers = parent.layers
    few, more = (parent.with_layers(layers[:count]) for count in (1, 2))
    a_layer = max(1, weight_bytes(more) - weight_bytes(few)) if len(layers) > 1 else 1
    count = 1 + max(0, MOST_BYTES - weight_bytes(few)) // a_layer
    return parent.with_layers(layers[: max(FEWEST_LAYERS, count)])


def design(base: ModelSpec, columns: Columns, vocabs: set[int], fits: Fits) -> list[ModelSpec]:
    """The models to be timed beside `base`; those that the engine cannot run (`fits`) are left out."""
    made: dict[ModelSpec, None] = {}
    for ways in _changes(base, columns):
        made.update(dict.fromkeys([next((spec for spec in ways if fits(spec)), base)]))
    made.update(dict.fromkeys(replace(base, vocab=vocab) for vocab in ({min(vocabs)} if vocabs else set())))
    made.pop(base, None)
    return list(made)


def _changes(base: ModelSpec, columns: Columns) -> Iterator[Iterator[ModelSpec]]:
    """Each change of the base, in the ways in which it can be made, best first: in every other layer, in all."""
    usual = _usual(base)
    own_attentions = {attention for layer in base.layers for attention in layer.attentions}
    yield iter([base.with_layers(base.layers[::2])])
    for attention in columns.attentions:
        yield _changed(base, partial(_without if attention in own_attentions else _attending, attention))
    for ffn in columns.ffns:
        if usual.ffn != ffn:
            yield _changed(base, partial(_of_width, ffn))


def _without(attention: AttentionSpec, layer: LayerSpec) -> LayerSpec:
    return replace(layer, attention=None) if layer.attention == attention else layer


def _attending(attention: AttentionSpec, layer: LayerSpec) -> LayerSpec:
    return replace(layer, attention=attention) if layer.attention else layer


def _of_width(ffn: FFNSpec, layer: LayerSpec) -> LayerSpec:
    return replace(layer, ffn=ffn) if layer.ffn else layer


def _changed(base: ModelSpec, change: Callable[[LayerSpec], LayerSpec]) -> Iterator[ModelSpec]:
    layers = base.layers
    for every in (2, 1):
        made = [change(layer) if index % every == every - 1 else layer for index, layer in enumerate(layers)]
        yield base.with_layers(_as_wide(made, layers))


def _as_wide(layers: list[LayerSpec], base: tuple[LayerSpec, ...]) -> list[LayerSpec]:
    """As many of the layers, from the first, as have no more channels in sum than the base has."""
    room, kept = sum(map(_channels, base)), list[LayerSpec]()
    for layer in layers:
        room -= _channels(layer)
        if room < 0 and len(kept) >= 2:
            break
        kept.append(layer)
    return kept


def _channels(layer: LayerSpec) -> int:
    return sum(ffn.width for ffn in layer.ffns)


def _usual(base: ModelSpec) -> LayerSpec:
    """The layer that there are most of."""
    shapes = [replace(layer, parents=()) for layer in base.layers]
    return max(shapes, key=shapes.count)
