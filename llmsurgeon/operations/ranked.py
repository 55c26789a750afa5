"""Steps on the layers that a recipe names, or on so many of those that a score ranks first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field

from llmsurgeon.model.layers import LayerList
from llmsurgeon.operations.base import Offer, Request, Step, Subject, lowest


@dataclass(frozen=True)
class Wanted(Request):
    """So many layers that can go are asked for."""

    count: int


@dataclass(frozen=True)
class Ranking:
    """How a score of the analysis says which layers can go first.

    highest: those of the highest values, else of the lowest.
    order: where the score is itself a list of layers in the order in which they go, how that is said when it is too
        short: what is counted, and why no more can go.
    """

    score: str
    highest: bool = False
    order: tuple[str, str] | None = None

    def first(self, subject: Subject, candidates: Sequence[int], count: int, op: str) -> tuple[int, ...]:
        """The `count` parent layers of `candidates` that can go first, in layer order.

        Raises:
            SurgeryError: there are not so many, or the score was not computed.
        """
        found = subject.score(self.score, op)
        if self.order is None:
            values = [-float(value) if self.highest else float(value) for value in found]
            return lowest(values, candidates, count, op)
        ranked = [layer for layer in found if layer in candidates]
        if len(ranked) < count:
            what, why = self.order
            raise subject.refuse(f"{op}: {count} {what} asked for, only {len(ranked)} can go{why}")
        return tuple(sorted(ranked[:count]))


class Ranked(Step):
    """A step on `layers`, or on the `count` layers that come first in its ranking."""

    layers: LayerList | None = None
    count: Annotated[int, Field(ge=1)] | None = None

    def ranking(self) -> Ranking:
        """The ranking that its `score` names."""
        raise NotImplementedError

    def candidates(self, subject: Subject) -> list[int]:
        """Parent layers that it can take."""
        raise NotImplementedError

    def needs(self) -> frozenset[str]:
        return frozenset() if self.count is None else frozenset({self.ranking().score})

    def requests(self, subject: Subject) -> tuple[Request, ...]:
        return () if self.count is None else (Wanted(self.ranking().score, self.count),)

    def resolve(self, subject: Subject) -> Step:
        if self.count is None:
            return self
        layers = self.ranking().first(subject, self.candidates(subject), self.count, self.op)
        return type(self).model_validate({"layers": layers})

    @classmethod
    def merged(cls, steps: Sequence[Self]) -> Sequence[Step]:
        return (cls.model_validate({"layers": [layer for step in steps for layer in step.layers or ()]}),)


def removals(step: type[Ranked], layers: Sequence[int], part: Literal["attention", "ffn", "all"]) -> list[Offer]:
    """An offer for each of these layers to have it no more."""
    gone = {"attention": "no attention", "ffn": "no FFN", "all": "gone"}[part]
    return [Offer((layer,), part, gone, (step.model_validate({"layers": [layer]}),)) for layer in layers]


def with_part(subject: Subject, part: str) -> list[int]:
    """Parent layers of those that have attention or an FFN (`part`) of their own."""
    return [b.parents[0] for b in subject.spec.layers if getattr(b, part) is not None and not b.branches]
