"""What a search found, as report.json has it: plain data, numbers and names."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Bound:
    """One target: in `unit`, of which less is better, what was asked for, and what the parent and the result cost.

    measured: None where the result was not made. ratio: the result's as targets count it.
    """

    target: str
    name: str
    unit: str
    budget: float
    parent: float
    predicted: float
    measured: float | None
    ratio: float


@dataclass(frozen=True)
class Scored:
    """An option: KL in nats a token with its 95 % interval, alone in the parent; costs by target name.

    layers: none where it is about the table of tokens, whose costs are beside the parent's.
    measured: False where the KL is foreseen to second order.
    """

    layers: tuple[int, ...]
    name: str
    kl: float
    low: float
    high: float
    costs: dict[str, float]
    measured: bool = True


# Query heads, key/value heads, width of the FFN; 0 where there is none.
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Chosen:
    """What stands in some layers, and what else might have, the best first: (name, KL alone).

    stands: the shape of each layer there, none where all are gone. costs: by target name, as a share of what the
    parent's layers there cost.
    """

    layers: tuple[int, ...]
    name: str
    kl: float
    others: tuple[tuple[str, float], ...]
    stands: tuple[Shape, ...] = ()
    costs: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """How many rows the table of tokens has, of how many, and what else it might have had: (name, KL alone).

    kl: what that costs by itself, in nats a token of the parent's. costs: by target name, what it saves, as a share of
    what the whole parent costs.
    """

    rows: int
    parent: int
    kl: float
    others: tuple[tuple[str, float], ...] = ()
    costs: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Point:
    """A whole model. kind: "measured" on the walk, "made" by a recipe, or "single", of one method.

    ratios: by target name, as targets count them. predicted: the sum of single scores. held_out: `kl` is of text that
    fitted and chose nothing, where the model was made, and so are perplexity, over the parent's, and of an encoder
    pooled, the cosine of its sequences' mean states to the parent's. chosen: it is what the recipe makes.
    """

    kind: str
    name: str
    ratios: dict[str, float]
    kl: float
    low: float
    high: float
    predicted: float | None = None
    perplexity: float | None = None
    pooled: float | None = None
    held_out: bool = False
    chosen: bool = False


# What may stand for how far a model is from its parent, and what each is called beside a number.
SHORT = {"kl": "KL", "cosine": "distance"}


@dataclass
class Found:
    """All of it. parent: the shapes of its layers. table: where there was a choice of it. timings: seconds a phase.

    distance: what `kl` stands for everywhere: "kl" in nats a token, or of an encoder "cosine", 1 - cos of last states.
    """

    model: str
    engine: str
    text: str
    tokens: int
    sequence_length: int
    operations: tuple[str, ...]
    distance: str = "kl"
    parent: tuple[Shape, ...] = ()
    bounds: tuple[Bound, ...] = ()
    options: tuple[Scored, ...] = ()
    layers: tuple[Chosen, ...] = ()
    table: Table | None = None
    points: list[Point] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def short(self) -> str:
        """What `distance` is called beside a number."""
        return SHORT[self.distance]

    def plain(self) -> dict[str, Any]:
        """report.json: the fields under their own names, NaN as null."""
        return {"version": 1, **{name: _finite(value) for name, value in asdict(self).items()}}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
