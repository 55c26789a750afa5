"""Fast feedforward networks: dense FFNs become trees of which a token visits one path.

Leaf form: a tree of hyperplanes chooses a leaf, a small FFN of the neurons that the leaf's tokens need; shared neurons
always work. Node form: trees of neurons, each of which also decides where to go next. Where the trees branch is
computed from calibration tokens before the plan, as a score ("fff"); the plan itself only picks rows.
Sources: arXiv 2308.14711 and 2311.10770, where such layers are trained from scratch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from llmsurgeon.model.families import Family
from llmsurgeon.model.layers import LayerList, write_ranges
from llmsurgeon.model.parts import FFFSpec, FFNSpec, Touch
from llmsurgeon.operations.base import Computed, NewLayer, Plan, Request, Step, Subject, all_kept, assemble

SCORE = "fff"
# What the budget form chooses from: shares of the neurons, and depths as shares of the deepest.
KEPT = tuple(k / 16 for k in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14))
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


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


class Shape(BaseModel):
    """One shape and the layers that get it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    layers: LayerList
    depth: Count
    leaf_width: Positive | None = None
    shared: Count = 0
    trees: Positive | None = None


@dataclass(frozen=True)
class Trees(Request):
    """Parent layer -> the shapes that it may take; how neurons are assigned, and the fewest tokens of a leaf."""

    wanted: Mapping[int, Sequence[FFFSpec]]
    assign: Literal["least_squares", "activation"]
    min_tokens: int


class FFF(Step):
    """Turn FFNs into fast feedforward networks.

    form: leaf or node.
    layers: which FFNs; all by default.
    depth, leaf_width, shared: one shape of the leaf form for all of them.
    depth, trees: one shape of the node form; by default as many trees as hold every neuron.
    shapes: or a shape for each group of layers.
    keep: or the share of these layers' FFN multiplications that may stay; layers, depths (up to `depth`) and widths
        are then chosen by measured error.
    shared_part: share of a token's neurons that are shared, with `keep`.
    assign: neurons of a leaf by what the others cannot stand in for (least_squares) or by activation.
    min_tokens: calibration tokens that each leaf must get.
    """

    op: Literal["fff"] = "fff"
    touches: ClassVar[frozenset[Touch]] = frozenset({Touch.REPLACES_FFN})
    form: Literal["leaf", "node"] = "leaf"
    layers: LayerList | None = None
    depth: Annotated[int, Field(ge=0, le=20)] | None = None
    leaf_width: Positive | None = None
    shared: Count | None = None
    trees: Positive | None = None
    shapes: tuple[Shape, ...] | None = None
    keep: Annotated[float, Field(gt=0, le=1)] | None = None
    shared_part: Annotated[float, Field(ge=0, lt=1)] = 0.25
    assign: Literal["least_squares", "activation"] = "least_squares"
    min_tokens: Positive = 64

    @model_validator(mode="after")
    def _one_way(self) -> FFF:
        explicit = self.depth is not None and self.keep is None
        if sum((explicit, self.shapes is not None, self.keep is not None)) != 1:
            raise ValueError("fff takes exactly one of depth (one shape for all layers), shapes, keep")
        if self.shapes is not None and self.layers is not None:
            raise ValueError("fff: shapes name their layers; leave out layers")
        if explicit and self.form == "leaf" and self.leaf_width is None:
            raise ValueError("fff: the leaf form needs leaf_width beside depth")
        everything: tuple[Any, ...] = (self, *(self.shapes or ()))
        for given in everything:
            if self.form == "leaf" and given.trees is not None:
                raise ValueError("fff: trees belong to form: node")
            if self.form == "node" and (given.leaf_width is not None or given.shared):
                raise ValueError("fff: leaf_width and shared belong to form: leaf")
            if self.form == "leaf" and isinstance(given, Shape) and given.leaf_width is None:
                raise ValueError("fff: shapes of the leaf form need leaf_width")
        return self

    def needs(self) -> frozenset[str]:
        return frozenset({SCORE})

    def requests(self, subject: Subject) -> tuple[Request, ...]:
        return (Trees(SCORE, self.wanted(subject), self.assign, self.min_tokens),)

    def wanted(self, subject: Subject) -> dict[int, tuple[FFFSpec, ...]]:
        """Parent layer -> the shapes that it may take: one, or with `keep` those to choose from.

        Raises:
            SurgeryError: a layer has no plain dense FFN, or a shape does not fit its width.
        """
        subject.check(self)
        if self.shapes is not None:
            chosen = {layer: shape for shape in self.shapes for layer in shape.layers}
        else:
            dense = tuple(
                b.parents[0]
                for b in subject.spec.layers
                if b.ffn and b.ffn.kind == FFNSpec.kind and len(b.parents) == 1
            )
            if not (self.layers or dense):
                raise subject.refuse("fff: no layer has a dense FFN as in the checkpoint")
            shape = Shape(
                layers=self.layers or dense,
                depth=self.depth or 0,
                leaf_width=self.leaf_width,
                shared=self.shared or 0,
                trees=self.trees,
            )
            chosen = dict.fromkeys(shape.layers, shape)
        return {layer: self._specs(subject, layer, shape) for layer, shape in sorted(chosen.items())}

    def _specs(self, subject: Subject, layer: int, shape: Shape) -> tuple[FFFSpec, ...]:
        width, neurons = self._dense(subject, layer), _neurons(subject, layer)
        if self.keep is None:
            return (self._spec(subject, layer, width, shape, neurons),)
        if self.form == "node":
            depths = range(1, min(self.depth or 5, (width + 1).bit_length() - 1) + 1)
            return tuple(FFFSpec.of_nodes(depth, _trees(width, depth), **neurons) for depth in depths)
        deepest = 4 if self.depth is None else self.depth
        return tuple(
            FFFSpec.of_leaves(depth, kept - shared, shared, **neurons)
            for depth in sorted({deepest, (deepest + 1) // 2})
            for kept in sorted({max(1, round(width * share)) for share in KEPT})
            for shared in (int(kept * self.shared_part),)
        )

    def _spec(self, subject: Subject, layer: int, width: int, shape: Shape, neurons: dict[str, bool]) -> FFFSpec:
        if self.form == "node":
            # The last level would have no neuron at all.
            if width < 2**shape.depth:
                raise subject.refuse(
                    f"fff: layer {layer}: depth {shape.depth} needs {2**shape.depth} neurons or more for one tree, the "
                    f"layer has {width}; the deepest tree is {width.bit_length() - 1}"
                )
            return FFFSpec.of_nodes(shape.depth, shape.trees or _trees(width, shape.depth), **neurons)
        if 2**shape.depth > width:
            raise subject.refuse(
                f"fff: layer {layer}: depth {shape.depth} makes {2**shape.depth} leaves of {width} neurons; the depth "
                f"may be {width.bit_length() - 1} at most"
            )
        assert shape.leaf_width
        if shape.leaf_width + shape.shared > width:
            raise subject.refuse(
                f"fff: layer {layer}: leaf_width {shape.leaf_width} and shared {shape.shared} are more than the "
                f"layer's {width} neurons"
            )
        return FFFSpec.of_leaves(shape.depth, shape.leaf_width, shape.shared, **neurons)

    def _dense(self, subject: Subject, number: int) -> int:
        """Width of a layer's FFN, which must be the parent's own."""
        layer = subject.spec.layers[subject.position(number, "fff: layer")]
        if layer.ffn is None or layer.branches:
            raise subject.refuse(f"fff: layer {number} has no FFN of its own")
        if len(layer.parents) > 1 or not layer.ffn.plain:
            raise subject.refuse(
                f"fff: layer {number} is not as in the checkpoint; write what earlier steps make, then run fff on that"
            )
        return layer.ffn.width

    def foresee(self, subject: Subject) -> Mapping[str, Any]:
        """Of one shape, that shape; of a budget, the widest shape within its share, the same for every layer."""
        found = {}
        for layer, specs in self.wanted(subject).items():
            spec = specs[0]
            if self.keep is not None:
                allowed = self.keep * self._dense(subject, layer) * (3 if spec.gated else 2)
                spec = max(specs, key=lambda s: (s.rows if s.rows <= allowed else -s.rows, s.depth))
            found[layer] = (Foreseen(spec, subject.spec.hidden),)
        return {SCORE: found}

    def resolve(self, subject: Subject) -> Step:
        if self.keep is None:
            return self
        routings = subject.score(SCORE, "fff")
        if _foreseen(routings):
            return self
        wanted = self.wanted(subject)
        rows = 3 if _neurons(subject, min(wanted))["gated"] else 2
        dense = {layer: rows * self._dense(subject, layer) for layer in wanted}
        options = {layer: [(r.spec.rows, r.error, r.spec) for r in routings[layer]] for layer in wanted}
        chosen = within_budget(options, dense, self.keep)
        left = sum(chosen[layer].rows if layer in chosen else dense[layer] for layer in dense) / sum(dense.values())
        if left > self.keep:
            raise subject.refuse(f"fff: keep {self.keep} is out of reach, {left:.3f} is the least; raise depth")
        groups: dict[FFFSpec, list[int]] = {}
        for layer, spec in chosen.items():
            groups.setdefault(spec, []).append(layer)
        if not groups:
            raise subject.refuse(f"fff: keep {self.keep} leaves every FFN as it is")
        leaf = self.form == "leaf"
        shapes = tuple(
            Shape(
                layers=tuple(layers),
                depth=spec.depth,
                leaf_width=spec.leaf_width if leaf else None,
                shared=spec.shared,
                trees=None if leaf else spec.trees,
            )
            for spec, layers in groups.items()
        )
        return self.model_copy(update={"keep": None, "depth": None, "layers": None, "shapes": shapes})

    @staticmethod
    def misfit(family: Family) -> str | None:
        if family.ffn_post_norm:
            return "it norms what an FFN gives before adding it, which the fit of a tree does not know"
        return None

    def plan(self, subject: Subject) -> Plan:
        routings = subject.score(SCORE, "fff")
        layers = all_kept(subject)
        alike: dict[str, list[int]] = {}
        before = after = 0
        for number, specs in self.wanted(subject).items():
            index = subject.position(number)
            # Resolved, a step wants one shape; foreseen, one stands for those to choose from.
            routing = next(r for r in routings[number] if r.spec in specs)
            spec = routing.spec
            dense = layers[index].spec.ffn
            assert dense
            whole = dense.width * (3 if spec.gated else 2)
            before += whole
            after += spec.rows
            layers[index] = _converted(subject, layers[index], routing)
            said = f"{spec.words}, {100 * spec.rows / whole:.1f} % of the FFN's multiplications{_measured(routing)}"
            alike.setdefault(said, []).append(number)
        total = f"Fast feedforward: {100 * after / before:.1f} % of these layers' FFN multiplications are left."
        if self.keep is not None:
            total += f" Shapes within the share of {self.keep} are chosen by measured error in the run itself; counted "
            total += "here are the same ones for every layer."
        notes = [
            f"layer{'s' if len(numbers) > 1 else ''} {write_ranges(numbers)}: {said}" for said, numbers in alike.items()
        ]
        return assemble(subject, layers, [total, *notes])


def within_budget(
    options: Mapping[int, Sequence[tuple[int, float, FFFSpec]]], dense: Mapping[int, int], keep: float
) -> dict[int, FFFSpec]:
    """The shapes that add least error within a budget of rows; layers that stay dense are left out.

    Starts with everything dense and, step by step, takes the cut that saves most rows for the error it adds.

    Args:
        options: layer -> (rows, error, shape); dense: layer -> rows of the dense FFN, whose error is 0.
        keep: share of the dense rows that may stay.
    """
    now = {layer: (rows, 0.0) for layer, rows in dense.items()}
    chosen: dict[int, FFFSpec] = {}
    budget = keep * sum(dense.values())
    while sum(rows for rows, _ in now.values()) > budget:
        steps = [
            ((error - now[layer][1]) / (now[layer][0] - rows), layer, rows, error, spec)
            for layer, given in options.items()
            for rows, error, spec in given
            if rows < now[layer][0]
        ]
        if not steps:
            break
        _, layer, rows, error, spec = min(steps, key=lambda step: step[:3])
        now[layer], chosen[layer] = (rows, error), spec
    return _refilled(options, now, chosen, budget)


def _refilled(
    options: Mapping[int, Sequence[tuple[int, float, FFFSpec]]],
    now: dict[int, tuple[int, float]],
    chosen: dict[int, FFFSpec],
    budget: float,
) -> dict[int, FFFSpec]:
    """The last cut may have saved too much: give back what still fits, where it lowers the error most."""
    while True:
        left = budget - sum(rows for rows, _ in now.values())
        steps = [
            (now[layer][1] - error, layer, rows, error, spec)
            for layer in chosen
            for rows, error, spec in options[layer]
            if 0 < rows - now[layer][0] <= left and error < now[layer][1]
        ]
        if not steps:
            return dict(sorted(chosen.items()))
        _, layer, rows, error, spec = max(steps, key=lambda step: step[:3])
        now[layer], chosen[layer] = (rows, error), spec


def _trees(width: int, depth: int) -> int:
    """Trees of this depth that hold all neurons; the last may have places without one."""
    return -(-width // (2 ** (depth + 1) - 1))


def _neurons(subject: Subject, layer: int) -> dict[str, bool]:
    """Whether a layer's neurons are gated, and whether they have biases on what they read."""
    family, names = subject.family, subject.tensors(subject.position(layer))
    return {
        "gated": len(family.ffn_in) * family.ffn_stacked == 2,
        "in_bias": family.ffn_tensor(family.ffn_in[0], "bias") in names,
    }


def _foreseen(routings: Mapping[int, Any]) -> bool:
    return any(isinstance(routing, Foreseen) for given in routings.values() for routing in given)


def _measured(routing: Any) -> str:
    """What the analysis measured of a routing, in words; nothing in a dry run."""
    if routing.error is None:
        return ""
    words = f", error {routing.error:.4f} of the stream behind it after a refit"
    leaf = routing.spec.form == "leaf"
    return words + (f", at least {routing.least_tokens} calibration tokens a leaf" if leaf else "")


def _converted(subject: Subject, layer: NewLayer, routing: Any) -> NewLayer:
    """The block with a tree in the place of its FFN: rows of the dense one, picked, and hyperplanes."""
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
