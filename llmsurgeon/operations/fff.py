"""Fast feedforward networks: dense FFNs become trees of which a token visits one path.

Leaf form: a tree of hyperplanes chooses a leaf, a small FFN of the neurons that the leaf's tokens need; shared neurons
always work. Node form: trees of neurons, each of which also decides where to go next. Where the trees branch is
computed from calibration tokens before the plan, as a score ("fff"); the plan itself only picks rows.
Sources: arXiv 2308.14711 and 2311.10770, where such layers are trained from scratch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llmsurgeon.model.families import Family
from llmsurgeon.model.layers import LayerList, write_ranges
from llmsurgeon.model.parts import FFFSpec, FFNSpec, Touch
from llmsurgeon.operations.base import Plan, Request, Step, Subject, all_kept, assemble
from llmsurgeon.operations.fff_budget import within_budget
from llmsurgeon.operations.fff_tensors import Foreseen, converted

SCORE = "fff"
# What the budget form chooses from: shares of the neurons, and depths as shares of the deepest.
KEPT = tuple(k / 16 for k in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14))
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


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
    alone: ClassVar[str] = "grows its trees from all tokens at once: run it in one process"
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
        shapes = tuple(_shape(spec, layers) for spec, layers in groups.items())
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
            layers[index] = converted(subject, layers[index], routing)
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


def _shape(spec: FFFSpec, layers: Sequence[int]) -> Shape:
    """How a recipe says that these layers get this shape."""
    leaf = spec.form == "leaf"
    return Shape(
        layers=tuple(layers),
        depth=spec.depth,
        leaf_width=spec.leaf_width if leaf else None,
        shared=spec.shared,
        trees=None if leaf else spec.trees,
    )


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
