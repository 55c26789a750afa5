"""An option as a module beside the parent, after its own closed-form fit: what a refit would make of that layer alone.

Puzzle (arXiv 2411.19146) distils each alternative block on what the parent's block reads, before it scores it; the
updates of the refit (healing/refit) are the closed form of that.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmsurgeon.formats.models import empty_model
from llmsurgeon.formats.surgeon import as_surgeon
from llmsurgeon.healing.batches import left
from llmsurgeon.healing.refit.attention import comes_back
from llmsurgeon.healing.refit.context import Context, LayerFit, RefitOptions
from llmsurgeon.healing.refit.refit import try_updates
from llmsurgeon.healing.store import LayerStore, on_copies
from llmsurgeon.model.spec import LayerSpec, ModelSpec, to_block_configs
from llmsurgeon.searching.ground import Ground
from llmsurgeon.searching.options import Cut, Option
from llmsurgeon.walk.memory import room
from llmsurgeon.walk.runner import LayerRunner

# Of the refit's ridges, the one that it most often takes: hundreds of options are fitted.
RIDGES = (0.1,)
# What fitted layers may take in memory, to be at hand when they are asked for again; and of what is free at first.
KEPT_BYTES, KEPT_SHARE = 1 << 30, 0.125


class Workshop:
    """Makes options of a parent: module by module, fitted on what the parent's layers read."""

    def __init__(self, config: Mapping[str, Any], parent: ModelSpec, ground: Ground, made: Sequence[Cut]) -> None:
        self.config, self.parent, self.ground = config, parent, ground
        self.cut_of = {option: cut for cut in made for option in cut.options}
        self._layers: dict[int, list[nn.Module]] = {}
        self._fitted: dict[Option, list[dict[str, Tensor]]] = {}
        free = room()
        self._most = min(KEPT_BYTES, KEPT_SHARE * free.bytes) if free else KEPT_BYTES

    @contextmanager
    def standing(self, option: Option) -> Iterator[LayerRunner]:
        """The parent's runner with the fitted option in the place of its layers; see `through`."""
        beside = self._beside(option)
        for (index, _), state in zip(self._places(option), self._of(option, beside), strict=True):
            beside.layers[index].load_state_dict(state, assign=True)
        try:
            yield beside
        finally:
            for index, _ in self._places(option):
                beside.layers[index].to("meta")

    def _of(self, option: Option, beside: LayerRunner) -> list[dict[str, Tensor]]:
        """The fitted tensors; the last ones that were asked for are kept."""
        found = self._fitted.pop(option, None)
        self._fitted[option] = found = self._fit(option, beside) if found is None else found
        while sum(map(_bytes, self._fitted.values())) > self._most and len(self._fitted) > 1:
            del self._fitted[next(iter(self._fitted))]
        return found

    def through(self, option: Option, beside: LayerRunner, hidden: Tensor) -> Tensor:
        """What an option that stands makes of what enters it, [s, T, D] -> [s, T, D]."""
        for index, _ in self._places(option):
            hidden = beside.whole(index, hidden)
        return hidden

    def _places(self, option: Option) -> list[tuple[int, int]]:
        """Of each layer that stands in its place: (the parent's layer whose place it takes, its place in the cut)."""
        return list(zip(option.layers, self.cut_of[option].places(option), strict=False))

    def _beside(self, option: Option) -> LayerRunner:
        """A runner that shares all with the parent's but the option's layers, which have no weights yet."""
        cut = self.cut_of[option]
        if id(cut) not in self._layers:
            layers: list[LayerSpec] = list(self.parent.layers)
            for each in cut.options:
                for (index, _), spec in zip(self._places(each), each.instead, strict=True):
                    layers[index] = spec
            described = {**as_surgeon(self.config), "block_configs": to_block_configs(self.parent.with_layers(layers))}
            runner = self.ground.runner
            self._layers[id(cut)] = list(empty_model(described).get_submodule(runner.family.layers))
        beside = copy.copy(self.ground.runner)
        beside.layers = list(beside.layers)
        for index, _ in self._places(option):
            beside.layers[index] = self._layers[id(cut)][index]
        return beside

    def _fit(self, option: Option, beside: LayerRunner) -> list[dict[str, Tensor]]:
        """Tensors of each layer that stands in the option's place, after the updates of the refit that apply there."""
        ground, cut = self.ground, self.cut_of[option]
        states = []
        entered = ground.fitting[option.layers[0]]
        with torch.no_grad():
            for place, (index, at) in enumerate(self._places(option)):
                module, prefix = beside.layers[index], beside.family.layer(at)
                state = {
                    name: cut.weights[prefix + name].to(device=beside.device, dtype=beside.dtype)
                    for name in module.state_dict()
                }
                module.load_state_dict(state, assign=True)
                on_copies(module)
                last = place == len(option.instead) - 1
                here = self._here(option, beside, index, entered, last)
                # What the parent's FFNs read is wanted of several layers, and where an attention is to come back to it.
                walked = len(here.span) > 1 or comes_back(here)
                if walked:
                    self._own(here)
                try_updates(here, None if walked else self._known)
                if not last:
                    entered = left(beside, ground.fits, index, entered, None, torch.empty_like(entered))
                states.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
        return states

    def _here(self, option: Option, beside: LayerRunner, index: int, entered: Tensor, last: bool) -> LayerFit:
        """The layer as the refit's updates see it: in front of it the parent's own stream, behind it the span's."""
        ground = self.ground
        spec = option.instead[option.layers.index(index)]
        # The last layer of several stands for what is left of the span.
        span = tuple(layer for layer in option.layers if layer >= index) if last else (index,)
        options, nowhere = fit_options(spec, span, self.parent), LayerStore(Path())
        context = Context(ground.runner, beside, self.parent, self.parent, ground.fits, options, nowhere)
        parent = ground.fitting[index]
        summed = torch.empty_like(parent) if beside.family.post_norm else parent
        return LayerFit(context, index, spec, span, beside.layers[index], True, False, entered, parent, summed)

    def _own(self, here: LayerFit) -> None:
        """A stream of the parent's that may be written over: walked over the span it is."""
        here.parent = here.parent.clone()
        if not here.family.post_norm:
            here.summed = here.parent

    def _known(self, here: LayerFit) -> None:
        """The parent's stream behind a span of one layer."""
        here.parent = self.ground.fitting[here.span[0] + 1]


def fit_options(layer: LayerSpec, span: tuple[int, ...], parent: ModelSpec) -> RefitOptions:
    """Which updates a layer is fitted with. An attention takes over for others where it is not simply the parent's."""
    joins = len(span) > 1 or layer.attention != parent.layers[span[0]].attention
    return RefitOptions(ridges=RIDGES, join=joins)


def _bytes(states: list[dict[str, Tensor]]) -> int:
    return sum(tensor.nbytes for state in states for tensor in state.values())
