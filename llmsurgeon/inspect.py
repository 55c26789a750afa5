"""`inspect`: what is in a model, layer by layer. A config.json is enough."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llmsurgeon.errors import SurgeryError
from llmsurgeon.model.costs import Costs, layer_parameters
from llmsurgeon.model.parts import AttentionSpec, FFNSpec
from llmsurgeon.model.spec import BlockTransformerSpec
from llmsurgeon.planning.opened import DescribedModel, open_config, open_known, shapes_of, ternary_by_layer


@dataclass(frozen=True)
class LayerRow:
    """One layer of a model.

    attention, ffn: the parts that the layer has; layers of parallel branches have several.
    parallel: how many branches there are, None in a plain layer.
    parameters: numbers in the layer's tensors.
    ternary: paths in the layer of the linears whose weights are ternary; None where no weights were looked at.
    """

    number: int
    attention: tuple[AttentionSpec, ...]
    ffn: tuple[FFNSpec, ...]
    parallel: int | None
    parameters: int
    ternary: tuple[str, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The row as `inspect --json` has it."""
        parts = {"attention": [part.row() for part in self.attention], "ffn": [part.row() for part in self.ffn]}
        looked = {} if self.ternary is None else {"ternary": list(self.ternary)}
        return {"block": self.number, **parts, "parallel": self.parallel, "parameters": self.parameters, **looked}


@dataclass(frozen=True)
class Inspected:
    """What `inspect` knows of a model.

    costs: parameters, multiplications, KV cache and disk of the whole.
    block_transformer: how it is divided where it is a block transformer, else None.
    problems: what keeps other verbs from using it, a sentence each.
    remarks: where config and weights disagree, and how that is read.
    """

    model: str
    model_type: str
    costs: Costs
    layers: tuple[LayerRow, ...]
    block_transformer: BlockTransformerSpec | None = None
    problems: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The object that `inspect --json` prints."""
        divided = {"block_transformer": asdict(self.block_transformer)} if self.block_transformer else {}
        return {
            "model": self.model,
            "model_type": self.model_type,
            **self.costs.to_dict(),
            **divided,
            "problems": list(self.problems),
            "remarks": list(self.remarks),
            "layers": [row.to_dict() for row in self.layers],
        }


def inspect(model: str | os.PathLike[str], *, revision: str | None = None) -> Inspected:
    """What is in `model` (hub id, folder, config.json or GGUF file): the parts of every layer, and what they cost.

    Of a model on this disk the weights are looked at, too: which linears are ternary, and whether config.json is right
    about them. Where they cannot be used, the config alone is described and `problems` says why. `revision` is one of
    the hub's.

    Raises:
        SurgeryError: not even the config can be read, or its family is not known.
    """
    name = os.fspath(model)
    parent, problems = _known(name, revision)
    shapes = shapes_of(parent.meta())
    numbers = layer_parameters(parent.spec, parent.family, shapes)
    ternary: Sequence[tuple[str, ...] | None] = ternary_by_layer(parent) or [None] * len(numbers)
    layers = zip(parent.spec.layers, numbers, ternary, strict=True)
    return Inspected(
        name,
        parent.model_type,
        parent.costs(parent.spec, shapes),
        tuple(
            LayerRow(index, layer.attentions, layer.ffns, len(layer.branches) or None, parameters, linears)
            for index, (layer, parameters, linears) in enumerate(layers)
        ),
        parent.spec.block_transformer,
        tuple(problems),
        parent.notes,
    )


def _known(model: str, revision: str | None) -> tuple[DescribedModel, list[str]]:
    """The model as far as it can be opened, and what keeps the other verbs from using it."""
    try:
        return open_known(model, revision), []
    except SurgeryError as error:
        try:
            return open_config(model, revision), [str(error)]
        except SurgeryError:
            raise error from None
