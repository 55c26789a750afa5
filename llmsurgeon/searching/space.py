"""All that a search may choose among: the options of a model, what each costs, and the program over them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from llmsurgeon.errors import SurgeryError
from llmsurgeon.model.spec import LayerSpec, ModelSpec
from llmsurgeon.operations import OPERATIONS
from llmsurgeon.operations.base import Offer
from llmsurgeon.planning.opened import OpenedCheckpoint
from llmsurgeon.searching.costs.meter import Meter, shape_of
from llmsurgeon.searching.options import Option, combined, cuts, offered, rows_of, stays, tables
from llmsurgeon.searching.solving import Choice, Program
from llmsurgeon.vocabulary.trimmed import least_rows

# Stands for every operation, those that must be asked for among them.
ALL = "all"


@dataclass(frozen=True)
class Space:
    """options: of every layer and of the table, those that nothing stands against; meters: one a target; costs
    [options][targets], those of a table beside the parent's."""

    parent: OpenedCheckpoint
    meters: Sequence[Meter]
    options: tuple[Option, ...]
    costs: list[tuple[float, ...]] = field(default_factory=list)

    @classmethod
    def of(cls, parent: OpenedCheckpoint, meters: Sequence[Meter], operations: Collection[str]) -> Space:
        """What the operations offer of a model, as far as every engine that is asked for can run it.

        Raises:
            SurgeryError: they offer nothing, or a tokenizer that cannot be trimmed though it was asked for.
        """
        bare = parent.subject({})
        offers = offered(bare, min(meter.grain for meter in meters), operations)
        foreseen: dict[str, dict[int, object]] = {}
        for offer in offers:
            for step in offer.steps:
                for name, values in step.foresee(bare).items():
                    foreseen.setdefault(name, {}).update(values)
        made = cuts(parent.subject(foreseen), parent.meta(), combined(len(parent.spec.layers), offers))
        changed = [option for cut in made for option in cut.options if _runs(meters, bare.spec.layers[0], option)]
        table = tables(len(bare.spec.layers), _borne_by_tokenizer(parent, offers))
        if not changed and not table:
            raise SurgeryError(
                f"{parent.name}: {', '.join(operations)} offer nothing to choose among for {parent.family.model_type} "
                "in this engine; allow other operations (--allow, --forbid), or take another engine"
            )
        kept = [stays(bare, layer) for layer in range(len(bare.spec.layers))]
        ordered = sorted((*kept, *changed), key=lambda option: (option.layers, len(option.offers)))
        return cls(parent, meters, (*ordered, *table))

    @property
    def distance(self) -> str:
        """What models are measured by: "kl", or of an encoder "cosine" (see `Found`)."""
        return "cosine" if self.parent.family.encoder else "kl"

    @property
    def operations(self) -> tuple[str, ...]:
        """Those that offer something here."""
        return tuple(dict.fromkeys(option.op for option in self.options if option.single))

    @property
    def shapes(self) -> list[LayerSpec]:
        """Every shape of a layer in it, once."""
        return list(dict.fromkeys(shape_of(layer) for option in self.options for layer in option.instead))

    @property
    def resized(self) -> list[ModelSpec]:
        """The parent with every smaller table that may be chosen."""
        return [replace(self.parent.spec, vocab=option.rows) for option in self.options if option.rows]

    @property
    def groups(self) -> int:
        """Of how many groups of options one is chosen: those of each layer, and those of the table where it has any."""
        return 1 + max(option.layers[-1] for option in self.options)

    def priced(self, seconds: float | None = None) -> Space:
        """With the cost of every option, measured where it has to be, in about so many seconds where they are given."""
        for meter in self.meters:
            if seconds is not None:
                meter.hurry(seconds / len(self.meters))
            meter.prepare(self.shapes, self.resized)
        return replace(self, costs=[tuple(_cost(meter, option) for meter in self.meters) for option in self.options])

    @property
    def budgets(self) -> tuple[float, ...]:
        """What all layers together may cost, for each target."""
        return tuple(meter.budget() - meter.rest(self.parent.spec) for meter in self.meters)

    def program(self, scores: NDArray[np.float64], tightened: Sequence[float]) -> tuple[Program, list[int]]:
        """The program over the options that have a score, with budgets `tightened` times, and the options' places."""
        rests = [meter.rest(self.parent.spec) for meter in self.meters]
        budgets = (meter.budget() * t - rest for meter, t, rest in zip(self.meters, tightened, rests, strict=True))
        places = [place for place, score in enumerate(scores) if np.isfinite(score)]
        choices = [Choice(self.options[p].layers, float(scores[p]), self.costs[p]) for p in places]
        return Program(self.groups, choices, tuple(budgets)), places

    def in_turn(self, places: Collection[int]) -> list[int]:
        """Options in the order in which they tell most while not all are scored.

        Tables first, of which there are few. Then each layer's in turn, first those that would just meet the targets
        if all layers were cut like that.
        """
        whole = {option.layers[0]: self.costs[p] for p, option in enumerate(self.options) if not option.changed}
        layers = range(len(self.parent.spec.layers))
        all_layers = [sum(whole[layer][t] for layer in layers) for t in range(len(self.meters))]
        needed = [budget / max(most, 1e-30) for budget, most in zip(self.budgets, all_layers, strict=True)]

        def off(place: int) -> float:
            mine = [sum(whole[layer][t] for layer in self.options[place].layers) for t in range(len(self.meters))]
            shares = [cost / max(most, 1e-30) for cost, most in zip(self.costs[place], mine, strict=True)]
            return abs(max(share - need for share, need in zip(shares, needed, strict=True)))

        groups: dict[int, list[int]] = {}
        for place in places:
            groups.setdefault(self.options[place].layers[0], []).append(place)
        tables = groups.pop(len(layers), [])
        ranked = [sorted(group, key=off) for _, group in sorted(groups.items())]
        turns = (place for turn in zip_longest(*ranked) for place in turn)
        return [*tables, *(place for place in turns if place is not None)]

    def spec(self, model: Sequence[int]) -> ModelSpec:
        """The description of a model of these options."""
        options = sorted((self.options[place] for place in model), key=lambda option: option.layers)
        rows = rows_of(options) or self.parent.spec.vocab
        layers = [layer for option in options for layer in option.instead]
        return replace(self.parent.spec.with_layers(layers), vocab=rows)

    def learnt(self, model: Sequence[int]) -> Space:
        """With costs corrected by what a model of these options really costs."""
        for meter in self.meters:
            meter.learn(self.spec(model))
        return self.priced()

    def total(self, model: Sequence[int]) -> list[float]:
        """What a model of these options costs, for each target."""
        rests = [meter.rest(self.parent.spec) for meter in self.meters]
        return [rest + sum(self.costs[place][t] for place in model) for t, rest in enumerate(rests)]

    def check_reach(self) -> None:
        """Raise SurgeryError where no choice meets the targets; it says what is in reach."""
        program, places = self.program(np.zeros(len(self.options)), [1.0] * len(self.meters))
        if program.best() is not None:
            return
        for target, meter in enumerate(self.meters):
            alone = replace(program, budgets=tuple(b if t == target else np.inf for t, b in enumerate(program.budgets)))
            least = alone.least(target)
            assert least is not None
            total = self.total([places[place] for place in least])[target]
            if total > meter.budget():
                raise SurgeryError(
                    f"target {meter.target.written} is out of reach: with all that may be cut the nearest is "
                    f"{meter.say(total)}; ask for that or less, or allow more operations (--allow, --forbid)"
                )
        written = " and ".join(meter.target.written for meter in self.meters)
        raise SurgeryError(f"targets {written} are each in reach, but not together; ask for less of one of them")


def chosen_operations(allow: Collection[str], forbid: Collection[str]) -> tuple[str, ...]:
    """The operations that may be used: those allowed, or all that need not be asked for, but those forbidden.

    Raises:
        SurgeryError: one of them is none, or none is left.
    """
    for name in (*allow, *forbid):
        if name not in OPERATIONS and (name != ALL or name in forbid):
            raise SurgeryError(f"{name!r} is no operation; expected {ALL} (to allow), {', '.join(OPERATIONS)}")
    usual = [name for name, step in OPERATIONS.items() if not step.asked_for]
    allowed = OPERATIONS if ALL in allow else allow or usual
    left = tuple(name for name in OPERATIONS if name in allowed and name not in forbid)
    if not left:
        raise SurgeryError("no operation is left: what --allow names, --forbid takes away")
    return left


def _borne_by_tokenizer(parent: OpenedCheckpoint, offers: Sequence[Offer]) -> list[Offer]:
    """The offers of smaller tables that hold what no vocabulary can be without."""
    resized = [offer for offer in offers if offer.rows]
    least = least_rows(parent.checkpoint) if resized else 0
    return [offer for offer in resized if (offer.rows or 0) >= least]


def _cost(meter: Meter, option: Option) -> float:
    """What an option costs: of a table, how much more than the parent's."""
    if option.rows is None:
        return sum(meter.layer(layer) for layer in option.instead)
    spec = meter.parent
    return meter.rest(replace(spec, vocab=option.rows)) - meter.rest(spec)


def _runs(meters: Sequence[Meter], stem: LayerSpec, option: Option) -> bool:
    """True where every engine can run a model with this option."""
    first = option.layers[0] == 0
    # Where the first layer goes, another is the first: one that may have lost its attention.
    layers = option.instead or ((replace(stem, attention=None),) if first else ())
    return not any(meter.misfit(layer, first) for meter in meters for layer in layers)
