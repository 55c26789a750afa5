"""An operation: a run of layers becomes one linear map, fitted by the refit behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from extending.part import LinearSpec
from llmsurgeon.model.layers import LayerList
from llmsurgeon.model.parts import Touch
from llmsurgeon.model.spec import LayerSpec
from llmsurgeon.operations import OPERATIONS
from llmsurgeon.operations.base import Computed, NewLayer, Request, Step, all_kept, assemble, exactly_one


@dataclass(frozen=True)
class RunOf(Request):
    """The best run of so many layers is asked for."""

    length: int


class LinearRun(Step):
    """Replace `layers`, neighbours, by one linear map; or the `length` layers that one map stands in for best."""

    op: Literal["linear_run"] = "linear_run"
    touches: ClassVar[frozenset[Touch]] = frozenset({Touch.REMOVES_LAYERS, Touch.REPLACES_FFN})
    layers: LayerList | None = None
    length: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _one_of(self):
        exactly_one("linear_run", layers=self.layers, length=self.length)
        return self

    @staticmethod
    def misfit(family):
        apart = family.post_norm or family.shares_norm or family.transposed or family.first_stays
        return "it needs a norm that only the FFN reads through" if apart else None

    def needs(self):
        return frozenset() if self.length is None else frozenset({"linear_run"})

    def requests(self, subject):
        return () if self.length is None else (RunOf("linear_run", self.length),)

    def resolve(self, subject):
        if self.length is None:
            return self
        errors = subject.score("linear_run", self.op)[self.length]
        start = min(errors, key=errors.get)
        return LinearRun(layers=tuple(range(start, start + self.length)))

    def plan(self, subject):
        subject.check(self)
        run = [subject.position(layer, "linear_run: layer") for layer in self.layers]
        if run != list(range(run[0], run[0] + len(run))):
            raise subject.refuse(f"linear_run: layers {list(self.layers)} are not neighbours")
        layers, norm = all_kept(subject), f"{subject.family.ffn_norm}.weight"
        width, map_ = subject.spec.hidden, subject.family.fast_ffn
        source = layers[run[0]].tensors[norm]
        # Nothing is added until the refit has found what.
        made = {
            norm: source,
            f"{map_}.weight": Computed((source,), lambda gain: gain.new_zeros(width, width)),
            f"{map_}.bias": Computed((source,), torch.zeros_like),
        }
        parents = tuple(parent for index in run for parent in layers[index].spec.parents)
        layers[run[0] : run[-1] + 1] = [NewLayer(LayerSpec(None, LinearSpec(width), parents), made)]
        return assemble(subject, layers, [f"Layers {parents[0]} to {parents[-1]} are one linear map."])


OPERATIONS["linear_run"] = LinearRun
