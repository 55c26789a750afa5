"""The tensors of a fast feedforward network: rows of the dense FFN, picked by a routing, and hyperplanes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmsurgeon.model.parts import FFFSpec
from llmsurgeon.operations.base import Computed, NewLayer, Subject


@dataclass(frozen=True)
class Foreseen:
    """A routing of which only the shape is known: its tensors hold nothing and can only make more such tensors."""

    spec: FFFSpec
    hidden: int
    error: None = None

    @property
    def neurons(self) -> Tensor:
        """As in the analysis' routing."""
        width = self.spec.leaf_width if self.spec.form == "leaf" else 2 ** (self.spec.depth + 1) - 1
        rows = 2**self.spec.depth if self.spec.form == "leaf" else self.spec.trees
        return torch.empty(rows, width, dtype=torch.long, device="meta")

    @property
    def shared(self) -> Tensor:
        """As in the analysis' routing."""
        return torch.empty(self.spec.shared, dtype=torch.long, device="meta")

    @property
    def router_weight(self) -> Tensor | None:
        """As in the analysis' routing."""
        nodes = 2**self.spec.depth - 1 if self.spec.form == "leaf" else 0
        return torch.empty(nodes, self.hidden, device="meta") if nodes else None

    @property
    def router_bias(self) -> Tensor | None:
        """As in the analysis' routing."""
        return None if self.router_weight is None else self.router_weight[:, 0]


def converted(subject: Subject, layer: NewLayer, routing: Any) -> NewLayer:
    """The layer with a tree in the place of its FFN: rows of the dense one, picked, and hyperplanes."""
    family, spec = subject.family, routing.spec
    names = {suffix: str(name) for suffix, name in layer.tensors.items()}
    path = f"{family.fast_ffn}."
    out = family.ffn_tensor(family.ffn_out)
    replaced = {family.ffn_tensor(p, kind) for p in (*family.ffn_in, family.ffn_out) for kind in ("weight", "bias")}
    tensors: dict[str, str | Computed] = {s: n for s, n in layer.tensors.items() if s not in replaced}
    groups = {"leaf": routing.neurons, "shared": routing.shared} if spec.form == "leaf" else {"node": routing.neurons}
    kinds = ("gate", "up") if spec.gated else ("up",)
    for group, neurons in groups.items():
        if not neurons.numel():
            continue
        for place, kind in enumerate(kinds):
            projection = family.ffn_in[place // family.ffn_stacked]
            part = place % family.ffn_stacked
            for tensor, suffix in (("weight", ""), ("bias", "_bias")):
                source = family.ffn_tensor(projection, tensor)
                if source in names:
                    pick = partial(picked, neurons, family.transposed, family.ffn_stacked, part)
                    tensors[f"{path}{group}_{kind}{suffix}"] = Computed((names[source],), pick)
        # The output projection holds a neuron's row as a column; Conv1D holds it as a row.
        tensors[f"{path}{group}_down"] = Computed((names[out],), partial(picked, neurons, not family.transposed, 1, 0))
    if routing.router_weight is not None:
        for name in ("router_weight", "router_bias"):
            tensors[path + name] = Computed((names[out],), _constant(getattr(routing, name)))
    bias = names.get(family.ffn_tensor(family.ffn_out, "bias"))
    rows = (2**spec.depth, subject.spec.hidden) if spec.form == "leaf" else (subject.spec.hidden,)
    target = path + ("leaf_out_bias" if spec.form == "leaf" else "out_bias")
    if bias is None:
        tensors[target] = Computed((names[out],), _constant(torch.zeros(rows)))
    else:
        tensors[target] = Computed((bias,), lambda given: given.expand(rows).contiguous())
    return NewLayer(replace(layer.spec, ffn=spec), tensors)


def picked(neurons: Tensor, transposed: bool, stacked: int, part: int, weight: Tensor) -> Tensor:
    """The rows of `weight` that belong to `neurons` [...], as [..., D]; of a bias the numbers, [...].

    Zero where `neurons` is -1. A `transposed` weight holds neurons as columns; of a `stacked` one `part` is meant.
    """
    rows = weight.T if transposed and weight.dim() == 2 else weight
    rows = rows.chunk(stacked)[part]
    index = neurons.to(weight.device)
    found = rows.index_select(0, index.flatten().clamp_min(0)).view(*index.shape, *rows.shape[1:])
    there = (index >= 0).view(*index.shape, *[1] * (rows.dim() - 1))
    return torch.where(there, found, torch.zeros((), dtype=weight.dtype, device=weight.device))


def _constant(value: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda like: value.to(device=like.device, dtype=like.dtype)
