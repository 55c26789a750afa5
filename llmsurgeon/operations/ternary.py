"""Ternary linears: weights become -1, 0, 1 times a scale of the tensor, of each row, or of each group of a row.

`round` needs no text and is an edit like any other: it streams. `compensated` chooses codes by what each layer reads,
the ternary layers before it included, on a walk over calibration text; that is healing/ternary/. Which linears: all
of the blocks' or a part of them, or those that cost least (`share`, `max_bytes`), by a score of analysis/ternary.py.
Sources: BitNet b1.58 (arXiv 2402.17764), ternary weight networks (arXiv 1605.04711), GPTQ (arXiv 2210.17323).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from llmsurgeon.checkpoint.transform import WeightTransform
from llmsurgeon.errors import SurgeryError
from llmsurgeon.model.layers import LayerList
from llmsurgeon.model.parts import Touch
from llmsurgeon.model.spec import ModelSpec
from llmsurgeon.model.ternary import Grid, Rule, is_ternary, rounded
from llmsurgeon.operations.base import HELD_OUT, Computed, NewLayer, Plan, Request, Step, Subject, all_kept, assemble
from llmsurgeon.operations.fit_memory import Text, ternary_bytes

SCORE, BYTES, SIZES = "ternary", "ternary_bytes", "ternary_inputs"
Share = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True)
class Linears(Request):
    """Layer -> names inside it of the weights that may become ternary, and on which grid."""

    linears: Mapping[int, Sequence[str]]
    grid: Grid


@dataclass(frozen=True)
class Norms(Request):
    """Layer -> paths inside it of the output projections that get a norm."""

    writers: Mapping[int, Sequence[str]]


class Ternary(Step):
    """Make linears ternary.

    linears: whose: the FFNs', the attentions', or all of the blocks'.
    layers: of which layers; all by default.
    modules: or a list of layers for each linear, by its path inside a block (mlp.down_proj: [0-5]).
    share, max_bytes: of these, those whose rounding changes their layers' output least, until this share of their
        numbers is ternary, or the model (ternary weights packed, 2 bits each) is no larger than this.
    method: compensated (codes make up for each other's errors on calibration text) or round.
    scale: the rule for codes and scale; granularity: what has one: the tensor, a row, or group_size numbers of it.
    embeddings, head: these, too, by rounding.
    sub_norm: an RMSNorm before each output projection of attention and FFN that becomes ternary (SubLN), whose gain is
        the usual size (geometric mean of RMS) of what the projection read; compensated then fits projection and gain.
        For a model that is trained afterwards: a norm there changes what the model computes.
    align: with compensated, first move each linear of changed and later layers to give what it gave before, be it
        made ternary or not; ridge: as multiples of mean(diag(X^T X)), the best on held-out tokens is taken.
    """

    op: Literal["ternary"] = "ternary"
    touches: ClassVar[frozenset[Touch]] = frozenset({Touch.REWRITES_LINEARS})
    linears: Literal["ffn", "attention", "all"] = "all"
    layers: LayerList | None = None
    modules: dict[str, LayerList] | None = None
    share: Share | None = None
    max_bytes: Annotated[int, Field(ge=1)] | None = None
    method: Literal["compensated", "round"] = "compensated"
    scale: Rule = "least_squares"
    granularity: Literal["tensor", "row", "group"] = "tensor"
    group_size: Annotated[int, Field(ge=32, multiple_of=32)] | None = None
    embeddings: bool = False
    head: bool = False
    sub_norm: bool = False
    align: bool = True
    ridge: tuple[Annotated[float, Field(gt=0)], ...] = (0.03, 0.1, 0.3, 1.0)
    held_out: Annotated[float, Field(gt=0, lt=1)] = HELD_OUT

    @model_validator(mode="after")
    def _consistent(self) -> Ternary:
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError("ternary: granularity group goes with group_size, the others without")
        if self.share is not None and self.max_bytes is not None:
            raise ValueError("ternary takes share or max_bytes, not both")
        if self.modules is not None and (self.layers or self.share or self.max_bytes or self.linears != "all"):
            raise ValueError("ternary: modules name their layers; leave out linears, layers, share and max_bytes")
        return self

    @property
    def heals(self) -> bool:  # type: ignore[override]
        """Codes that compensate are found as a refit is: on a walk, after all cuts."""
        return self.method == "compensated"

    @property
    def grid(self) -> Grid:
        """What shares a scale, and by which rule it is chosen."""
        return Grid(self.scale, self.granularity, self.group_size)

    def withholds(self) -> float | None:
        return self.held_out if self.heals else None

    def needs(self) -> frozenset[str]:
        return frozenset(({SCORE} if self._budget else set()) | ({SIZES} if self.sub_norm else set()))

    @property
    def _budget(self) -> bool:
        return bool(self.share or self.max_bytes)

    def requests(self, subject: Subject) -> list[Request]:
        linears = [Linears(SCORE, self.chosen(subject), self.grid)] if self._budget else []
        return [*linears, *([Norms(SIZES, self.normed(subject))] if self.sub_norm else [])]

    def foresee(self, subject: Subject) -> Mapping[str, Any]:
        """Of norms that are to be, all but the size of their gains."""
        if not self.sub_norm:
            return {}
        writers = (*subject.family.sub_norms,)
        return {SIZES: {b.parents[0]: dict.fromkeys(writers, 1.0) for b in subject.spec.layers if not b.branches}}

    def normed(self, subject: Subject) -> dict[int, tuple[str, ...]]:
        """Block -> output projections inside it that get a norm: those that become ternary and have none.

        Raises:
            SurgeryError: the family has no place for norms there, or a block's parts are not as in the checkpoint.
        """
        if not self.sub_norm:
            return {}
        if reason := subject.family.no_sub_norm():
            raise subject.refuse(f"ternary: sub_norm: {reason}")
        found: dict[int, tuple[str, ...]] = {}
        for index, names in self.chosen(subject).items():
            layer = subject.spec.layers[index]
            if len(layer.parents) > 1 or (layer.own_kind and not layer.sub_normed):
                what = layer.own_kind or "holds fused FFNs"
                raise subject.refuse(f"ternary: sub_norm: layer {layer.parents[0]} {what}; name other layers")
            writers = subject.family.sub_norms.items()
            mine = [path for path, (part, _) in writers if f"{path}.weight" in names and part not in layer.sub_normed]
            found[index] = tuple(mine)
        return {index: paths for index, paths in found.items() if paths}

    def chosen(self, subject: Subject) -> dict[int, tuple[str, ...]]:
        """Block -> names inside it of the weights that become ternary; a budget has not been drawn from yet.

        Raises:
            SurgeryError: a block has no such linears.
        """
        subject.check(self)
        if subject.spec.tied and (self.head or self.embeddings):
            raise subject.refuse(
                "ternary: head and embedding are one tied tensor, and a ternary head costs more than all blocks; leave "
                "out embeddings and head"
            )
        if self.modules is not None:
            return self._by_module(subject, self.modules)
        found: dict[int, tuple[str, ...]] = {}
        for index, layer in enumerate(subject.spec.layers):
            if self.layers is not None and not set(self.layers) & set(layer.parents):
                continue
            found[index] = self._linears(subject, index)
        for number in self.layers or ():
            if not found[subject.position(number, "ternary: layer")]:
                raise subject.refuse(f"ternary: layer {number} has no linears of {self.linears}")
        return {index: names for index, names in found.items() if names}

    def _by_module(self, subject: Subject, modules: Mapping[str, tuple[int, ...]]) -> dict[int, tuple[str, ...]]:
        found: dict[int, tuple[str, ...]] = {}
        for module, layers in modules.items():
            for layer in layers:
                index = subject.position(layer, f"ternary: {module} of layer")
                known = linears_of(subject, index)
                if f"{module}.weight" not in known:
                    names = ", ".join(name.removesuffix(".weight") for name in known)
                    raise subject.refuse(f"ternary: layer {layer} has no linear {module}; it has {names}")
                found[index] = (*found.get(index, ()), f"{module}.weight")
        return dict(sorted(found.items()))

    def _linears(self, subject: Subject, index: int) -> tuple[str, ...]:
        if subject.spec.layers[index].branches:
            layer = subject.spec.layers[index].parents[0]
            raise subject.refuse(
                f"ternary: layer {layer} is one of parallel blocks, which have no linears of their own"
            )
        family, known = subject.family, linears_of(subject, index)
        if self.linears != "attention" and family.experts:
            raise subject.refuse("ternary: its FFN is a mixture of experts; linears: attention is possible")
        if self.linears == "all":
            return known
        return tuple(name for name in known if family.is_attention(name) == (self.linears == "attention"))

    def check_follower(self, step: Step) -> None:
        if isinstance(step, Ternary):
            if self.sub_norm or step.sub_norm:
                raise SurgeryError(
                    "ternary: a step with sub_norm is the only ternary step of a recipe; run two recipes"
                )
        elif not step.heals:
            raise SurgeryError(f"step {step.op} comes after ternary: what it joins or folds would not stay ternary")

    def check_weights(self, subject: Subject, weights: Mapping[str, Tensor]) -> None:
        """A linear that is to become ternary must not be so already, and must have whole groups."""
        for index, names in self.chosen(subject).items():
            for name in names:
                full = subject.family.layer(index) + name
                weight = weights[full]
                self.grid.group(weight.shape[0 if subject.family.transposed else 1])
                refuse_ternary(full, weight, subject.family.transposed)

    def made_ternary(self, student: Subject) -> dict[str, str]:
        head = [f"{student.family.head}.weight"] if self.head else []
        return dict.fromkeys([*self._names(student), *head], self.granularity)

    def fit_bytes(self, parent: ModelSpec, student: Subject, shapes: Mapping[str, tuple[int, ...]], text: Text) -> int:
        linears = [shapes[name] for name in self._names(student) if name in shapes]
        turned = [shape[::-1] if student.family.transposed else shape for shape in linears]
        hidden = student.spec.hidden
        return max((ternary_bytes(inputs, outputs, text, hidden) for outputs, inputs in turned), default=0)

    def _names(self, subject: Subject) -> list[str]:
        """Full names of the layers' weights that become ternary."""
        layers = self.chosen(subject).items()
        return [subject.family.layer(index) + name for index, inside in layers for name in inside]

    def resolve(self, subject: Subject) -> Step:
        if not self._budget:
            return self
        costs, everything = subject.score(SCORE, "ternary"), subject.score(BYTES, "ternary")
        candidates = {
            (subject.spec.layers[index].parents[0], name): index
            for index, names in self.chosen(subject).items()
            for name in names
        }
        for layer, name in candidates:
            if name not in costs.get(layer, {}):
                raise subject.refuse(
                    f"ternary: {name} of layer {layer} is not as in the checkpoint and was not measured; name modules "
                    "instead of share or max_bytes"
                )
        cheapest = sorted(candidates, key=lambda at: (costs[at[0]][at[1]][0] / costs[at[0]][at[1]][1], at))
        numbers = sum(costs[layer][name][1] for layer, name in candidates)
        modules: dict[str, list[int]] = {}
        done, left = 0, everything
        for layer, name in cheapest:
            if done >= self.share * numbers if self.share is not None else left <= (self.max_bytes or 0):
                break
            _, count, size = costs[layer][name]
            done, left = done + count, left - count * size + count // 4
            modules.setdefault(name.removesuffix(".weight"), []).append(layer)
        if self.max_bytes is not None and left > self.max_bytes:
            raise subject.refuse(
                f"ternary: max_bytes {self.max_bytes:,} is out of reach: with all of {self.linears} ternary "
                f"{left:,} bytes are left, of {everything:,}"
            )
        if not modules:
            raise subject.refuse(f"ternary: the model has {everything:,} bytes already; nothing would become ternary")
        chosen = {module: tuple(sorted(layers)) for module, layers in sorted(modules.items())}
        update = {"share": None, "max_bytes": None, "layers": None, "linears": "all", "modules": chosen}
        return self.model_copy(update=update)

    def plan(self, subject: Subject) -> Plan:
        chosen, family = self.chosen(subject), subject.family
        edit = edited(self.grid, family.transposed)
        layers = all_kept(subject)
        if self.method == "round":
            for index, names in chosen.items():
                tensors: dict[str, str | Computed] = dict(layers[index].tensors)
                for name in names:
                    source = str(layers[index].tensors[name])
                    tensors[name] = Computed((source,), partial(edit, source))
                layers[index] = NewLayer(layers[index].spec, tensors)
        normed = self.normed(subject)
        for index, paths in normed.items():
            layers[index] = _with_norms(subject, layers[index], paths)
        plan = assemble(subject, layers, [self._note(chosen, sum(map(len, normed.values())))])
        outside = [(f"{family.embedding}.weight", self.embeddings), (f"{family.head}.weight", self.head)]
        plain = edited(self.grid, transposed=False)
        transforms = []
        for name, wanted in outside:
            if wanted and name not in subject.names:
                raise subject.refuse(f"ternary: this model has no {name}")
            if wanted:
                transforms.append(WeightTransform((name,), (name,), partial(plain, name)))
        return Plan(plan.spec, (*plan.transforms, *transforms), plan.notes)

    def _note(self, chosen: Mapping[int, tuple[str, ...]], norms: int) -> str:
        per = {"tensor": "tensor", "row": "row", "group": f"{self.group_size} numbers of a row"}[self.granularity]
        count = sum(len(names) for names in chosen.values())
        how = (
            "codes compensate each other"
            if self.method == "compensated"
            else "by rounding, which training is to make up for"
        )
        more = [name for name, wanted in (("embedding", self.embeddings), ("head", self.head)) if wanted]
        also = f" and {' and '.join(more)}" if more else ""
        said = f"Ternary: {count} linears of {len(chosen)} blocks{also}, a scale for each {per} ({self.scale}), {how}."
        return said + (f" An RMSNorm stands before {norms} of them, which the parent does not have." if norms else "")


def linears_of(subject: Subject, index: int) -> tuple[str, ...]:
    """Names inside block `index` of the weights of its attention's and its FFN's linears, in order."""
    family, there = subject.family, subject.tensors(index)
    ffn = () if family.experts else tuple(family.ffn_tensor(p) for p in (*family.ffn_in, family.ffn_out))
    attention = (
        name
        for name in there
        if name.startswith(f"{family.attention}.") and name.endswith(".weight") and "norm" not in name.lower()
    )
    return (*attention, *(name for name in ffn if name in there))


def _with_norms(subject: Subject, layer: NewLayer, paths: tuple[str, ...]) -> NewLayer:
    """The block with an RMSNorm before the projections at `paths`, whose gain is the size of what they read."""
    sizes, number = subject.score(SIZES, "ternary: sub_norm"), layer.spec.parents[0]
    spec, tensors = layer.spec, dict(layer.tensors)
    for path in paths:
        part, norm = subject.family.sub_norms[path]
        own = {part: replace(getattr(spec, part), sub_norm=True)}
        spec = replace(spec, **own)
        weight = subject.tensors(subject.position(number))[f"{path}.weight"]
        tensors[f"{norm}.weight"] = Computed((weight,), partial(_gain, sizes[number][path]))
    return NewLayer(spec, tensors)


def _gain(size: float, weight_OI: Tensor) -> Tensor:
    return torch.full_like(weight_OI[0], size)


def edited(grid: Grid, transposed: bool) -> Callable[[str, Tensor], Tensor]:
    """The edit that rounds one weight, whose name it takes first; a `transposed` weight is [I, O]."""

    def edit(name: str, weight: Tensor) -> Tensor:
        refuse_ternary(name, weight, transposed)
        made = rounded(weight.T if transposed else weight, grid)
        return made.T.contiguous() if transposed else made

    return edit


def refuse_ternary(name: str, weight: Tensor, transposed: bool = False) -> None:
    """Raise SurgeryError for a weight that is ternary already."""
    if is_ternary(weight.T if transposed else weight):
        raise SurgeryError(
            f"ternary: {name} is ternary already, and each further rounding shrinks its scale; start from the weights "
            "before, or name other layers"
        )


__all__ = ["Ternary", "edited", "linears_of", "refuse_ternary"]
