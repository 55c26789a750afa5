"""Ternary linears whose codes compensate: layer by layer, on what each linear reads behind the ternary ones before it.

The dense student and the ternary one walk side by side. In each layer, group by group in the order in which data flows
(what reads the attention's input, its output projection, what reads the FFN's input, its output projection):

    align       once something before it is ternary, a linear reads something else than it did. It is moved by ridge
                regression to give what the dense student's gave; a projection that writes the stream also makes up for
                what the stream has drifted. Linears that stay dense are moved, too.
    ternarise   codes in GPTQ's column order with error compensation, scales fitted anew (llmsurgeon/model/ternary.py).

Part of the sequences is held out and fits nothing; it chooses the ridge, and a move that does not lower the error there
is not made.

A norm that the step puts before an output projection is not there in the dense student, so the projection is aligned to
make up for it; behind the codes the norm's gain, one number for each of the projection's inputs, is fitted, too.

Shapes: S sequences, T tokens, D model width, I inputs and O outputs of a linear.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmsurgeon.errors import SurgeryError
from llmsurgeon.healing.batches import attended, embedded, left
from llmsurgeon.healing.store import Stored, layer_name, moved, on_copies
from llmsurgeon.healing.ternary.context import LayerCodes, TernaryContext, dense_layer, groups
from llmsurgeon.healing.ternary.group import fit_group
from llmsurgeon.healing.ternary.linears import TernaryLinear
from llmsurgeon.model.ternary import is_ternary
from llmsurgeon.processes.exchange import send
from llmsurgeon.progress import Progress
from llmsurgeon.walk.streams import Streams


@dataclass(frozen=True)
class Ternarised:
    """What was made. files: name of every tensor that changed -> the safetensors file that holds it."""

    files: dict[str, Path]
    linears: tuple[TernaryLinear, ...]


def ternarise(context: TernaryContext) -> Ternarised:
    """Layer after layer, from the first that becomes ternary on.

    Raises:
        SurgeryError: a weight is ternary already, a hidden state is not finite, or the disk fails.
    """
    _refuse_ternary(context)
    runner, batches = context.runner, context.batches
    mine = dense = embedded(runner, batches)
    files: dict[str, Path] = {}
    linears: list[TernaryLinear] = []
    with torch.no_grad(), Progress("ternarise", len(runner.layers), "blocks") as progress:
        for index in range(len(runner.layers)):
            with runner.loaded(index) as module:
                if index in context.chosen or mine is not dense:
                    here = LayerCodes(context, index, module, mine, dense)
                    stored, mine, dense = ternary_layer(here)
                    files |= stored.files
                    linears += [TernaryLinear(**record) for record in stored.records]
                else:
                    into = Streams(1, tuple(mine.shape), mine.dtype).data[0]
                    mine = dense = left(runner, batches, index, mine, None, into)
            progress.advance()
    return Ternarised(files, tuple(linears))


def ternary_layer(here: LayerCodes) -> tuple[Stored, Tensor, Tensor]:
    """Ternarise one loaded layer, or take what an earlier run stored.

    Returns what is stored of it, and the streams behind it: the ternary student's and the dense one's.
    """
    runner, store, prefix = here.runner, here.context.store, here.family.layer(here.index)
    stored = store.found(layer_name(here.index))
    if stored is not None:
        # The same sums in the same order as the run that stored it.
        dense = dense_layer(here, ())
        stored.load_into(here.module, prefix)
        return stored, _left(here, _attended(here)), dense.left
    todo = groups(here.module, here.family)
    watched = [name for group in todo for name in group.modules] if here.context.ridges else []
    dense = dense_layer(here, watched)
    before = on_copies(here.module)
    behind: Tensor | None = None
    for group in todo:
        if group.part == "ffn" and behind is None:
            behind = _attended(here)
        fit_group(here, group, dense, behind)
    send(0, list(here.module.state_dict().values()))  # codes that rounding may turn over are the same in all processes
    mine = _left(here, _attended(here) if behind is None else behind)
    new = {n: t.to(runner.weights[n].dtype) for n, t in moved(here.module, before, prefix).items()}
    return store.keep(layer_name(here.index), new, here.made), mine, dense.left


def _attended(here: LayerCodes) -> Tensor:
    """The ternary student's stream behind the layer's attention."""
    return attended(here.runner, here.context.batches, here.index, here.mine)


def _left(here: LayerCodes, behind: Tensor) -> Tensor:
    """The ternary student's stream behind the layer."""
    return left(here.runner, here.context.batches, here.index, here.mine, behind, torch.empty_like(behind))


def _refuse_ternary(context: TernaryContext) -> None:
    family = context.runner.family
    for index, names in context.chosen.items():
        for name in names:
            weight = context.runner.weights[family.layer(index) + name]
            if is_ternary(weight.T if family.transposed else weight):
                raise SurgeryError(
                    f"ternary: {family.layer(index)}{name} is ternary already, and each further rounding shrinks its "
                    "scale; start from the weights before, or name other layers"
                )
