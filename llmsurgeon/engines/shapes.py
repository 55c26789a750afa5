"""Tensors of models that are not there: names and shapes that follow from a parent and a description."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from llmsurgeon.formats.models import empty_model, expected_shapes
from llmsurgeon.formats.write import write_config
from llmsurgeon.model.costs import Costs
from llmsurgeon.model.families import Family
from llmsurgeon.model.spec import LayerSpec, ModelSpec
from llmsurgeon.planning.opened import DescribedModel, shapes_of


@dataclass(frozen=True)
class Described:
    """A model without weights: canonical names and shapes of its tensors, and its costs.

    config: config.json of it in the surgeon form, which transformers builds.
    source: the parent's, with this vocabulary.
    dtype: the parent's.
    """

    spec: ModelSpec
    family: Family
    config: dict[str, Any]
    source: dict[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    costs: Costs


class Shapes:
    """Models like `parent`, of other layers or another vocabulary, described once each."""

    def __init__(self, parent: DescribedModel) -> None:
        self.parent = parent
        shapes = shapes_of(parent.meta())
        self._beside = {name: shapes[name] for name in parent.beside if name in shapes}
        self._made: dict[ModelSpec, Described] = {}

    @property
    def stem(self) -> LayerSpec:
        """A layer as the family has it, beside which others are looked at."""
        layers = self.parent.spec.layers
        return next((each for each in layers if each.attention and each.ffn and not each.branches), layers[0])

    def of(self, spec: ModelSpec) -> Described:
        """The model of this description.

        Raises:
            SurgeryError: transformers cannot build it.
        """
        spec = spec.with_layers([self._placed(layer) for layer in spec.layers if not layer.empty])
        if spec not in self._made:
            self._made[spec] = self._describe(spec)
        return self._made[spec]

    def beside_stem(self, *layers: LayerSpec) -> ModelSpec:
        """The parent with its stem and these layers alone."""
        return self.parent.spec.with_layers((self.stem, *layers))

    def _placed(self, layer: LayerSpec) -> LayerSpec:
        """The layer as one that came from the parent: lists in config.json follow the first of those it is made of."""
        branches = tuple(self._placed(branch) for branch in layer.branches)
        if layer.parents:
            return replace(layer, branches=branches)
        alike = (
            index
            for index, own in enumerate(self.parent.spec.layers)
            if own.attention and layer.attention and _mask(own) == _mask(layer)
        )
        return replace(layer, parents=(next(alike, 0),), branches=branches)

    def _describe(self, spec: ModelSpec) -> Described:
        parent = self.parent
        source = _of_vocabulary(parent.config, spec.vocab)
        written = write_config(spec, parent.family, source, "surgeon")
        shapes = expected_shapes(empty_model(written.config))
        costs = parent.costs(spec, shapes | self._beside)
        return Described(spec, parent.family, written.config, source, shapes, parent.dtype, costs)


def _mask(layer: LayerSpec) -> tuple[int | None, bool] | None:
    return (layer.attention.window, layer.attention.rope) if layer.attention else None


def _of_vocabulary(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The config with so many tokens; special ones beyond them are left out."""
    if config["vocab_size"] == rows:
        return dict(config)
    beyond = {
        key: None
        for key, value in config.items()
        if key.endswith("_token_id") and isinstance(value, int) and value >= rows
    }
    return {**config, **beyond, "vocab_size": rows}
