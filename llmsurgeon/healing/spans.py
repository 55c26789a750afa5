"""Which of the parent's layers each layer of a student stands for, and whether it is simply one of them."""

from __future__ import annotations

from torch import nn

from llmsurgeon.model.spec import LayerSpec, ModelSpec
from llmsurgeon.model.ternary import is_ternary


def spans(spec: ModelSpec, parent_layers: int) -> list[tuple[int, ...]]:
    """The parent layers whose joint work each layer of the student does: removed layers go to the one before them."""
    first = [min(layer.parents) for layer in spec.layers]
    ends = [*first[1:], parent_layers]
    starts = [0, *first[1:]]
    return [tuple(range(start, end)) for start, end in zip(starts, ends, strict=True)]


def changed(layer: LayerSpec, span: tuple[int, ...], parent: ModelSpec) -> bool:
    """True where the layer is not simply the parent's."""
    return len(span) != 1 or (layer.attention, layer.ffn, layer.branches) != (
        parent.layers[span[0]].attention,
        parent.layers[span[0]].ffn,
        (),
    )


def holds_ternary(module: nn.Module, transposed: bool) -> bool:
    """True where some linear of a loaded layer is ternary."""
    return any(is_ternary(weight.T if transposed and weight.dim() == 2 else weight) for weight in module.parameters())
