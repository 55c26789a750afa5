"""What is made ternary and on which text, the layer under work, and what the dense student does there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmsurgeon.healing.batches import Batches, passes
from llmsurgeon.healing.store import LayerStore
from llmsurgeon.healing.ternary.linears import TernaryLinear
from llmsurgeon.model.families.base import Family
from llmsurgeon.model.ternary import Grid
from llmsurgeon.walk.runner import LayerRunner


@dataclass(frozen=True)
class TernaryContext:
    """A dense student, and which of its linears become ternary on which text.

    runner: over the dense student's weights, layer by layer.
    chosen: layer -> names inside it of the weights that become ternary.
    grid: the codes and how many share a scale.
    ridges: candidates for aligning, as multiples of the mean diagonal of X^T X; none: nothing is aligned.
    store: keeps each layer's new tensors as soon as they are found: a killed run goes on there.
    normed: layer -> output projections inside it whose norms are new: the dense student goes without them.
    """

    runner: LayerRunner
    chosen: Mapping[int, Sequence[str]]
    batches: Batches
    grid: Grid
    ridges: tuple[float, ...]
    store: LayerStore
    normed: Mapping[int, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """Linears of one layer that read the same input; `writes` where what they give is added to the stream."""

    part: str
    modules: tuple[str, ...]
    writes: bool


@dataclass
class LayerCodes:
    """One loaded layer on its way from dense to ternary.

    mine, dense: what enters it in the ternary student and in the dense one, [S, T, D]; one tensor where nothing before
    it is ternary.
    """

    context: TernaryContext
    index: int
    module: Any
    mine: Tensor
    dense: Tensor
    made: list[TernaryLinear] = field(default_factory=list)

    @property
    def runner(self) -> LayerRunner:
        """Runs the layer."""
        return self.context.runner

    @property
    def family(self) -> Family:
        """Whose names the tensors have."""
        return self.context.runner.family

    @property
    def drifted(self) -> bool:
        """True where something before the layer is ternary."""
        return self.mine is not self.dense

    def weight(self, linear: str) -> Tensor:
        """A linear's weight as a view [O, I]."""
        weight: Tensor = self.module.get_submodule(linear).weight.data
        return weight.T if self.family.transposed else weight

    def norm(self, linear: str) -> Any:
        """The norm before an output projection."""
        return self.module.get_submodule(self.family.sub_norms[linear][1])


def groups(module: nn.Module, family: Family) -> list[Group]:
    """A layer's linears in the order in which data flows."""
    found: list[Group] = []
    inside = f"{family.attention}."
    linears = [name for name, m in module.named_modules() if getattr(m, "weight", torch.empty(0)).dim() == 2]
    out = inside + family.attention_out
    readers = tuple(name for name in linears if name.startswith(inside) and name != out)
    if readers:
        found += [Group("attention", readers, False), Group("attention", (out,), True)]
    ffn = tuple(name for p in family.ffn_in if (name := family.ffn_module(p)) in linears)
    if ffn and not family.experts:
        found += [Group("ffn", ffn, False), Group("ffn", (family.ffn_module(family.ffn_out),), True)]
    return found


@dataclass(frozen=True)
class DenseLayer:
    """What the dense student does at one layer.

    attended, left: its stream behind the layer's attention and behind the layer, [S, T, D].
    outputs: linear -> what it gives, [S, T, O].
    """

    attended: Tensor
    left: Tensor
    outputs: dict[str, Tensor]


def dense_layer(here: LayerCodes, linears: Sequence[str]) -> DenseLayer:
    """Take the dense student's stream through the layer, and keep what some of its linears give."""
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: seen.setdefault(name, []).append(output.cpu())

    hooks = [here.module.get_submodule(name).register_forward_hook(keep(name)) for name in linears]
    left, attended = torch.empty_like(here.dense), torch.empty_like(here.dense)
    try:
        with _without_norms(here):
            for part, layer in passes(here.runner, here.context.batches, here.index, here.dense):
                attended[part], left[part] = layer.attended.cpu(), layer.left.cpu()
    finally:
        for hook in hooks:
            hook.remove()
    return DenseLayer(attended, left, {name: torch.cat(outputs) for name, outputs in seen.items()})


@contextmanager
def _without_norms(here: LayerCodes) -> Iterator[None]:
    """The layer as the dense student has it."""
    norms = [here.norm(path) for path in here.context.normed.get(here.index, ())]
    for norm in norms:
        norm.forward = _as_it_is
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _as_it_is(x: Tensor) -> Tensor:
    return x
