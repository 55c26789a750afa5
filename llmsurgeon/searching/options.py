"""What may stand in the place of each layer: options, made of what the operations offer."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

from torch import Tensor

from llmsurgeon.checkpoint.transform import TransformedWeights
from llmsurgeon.errors import SurgeryError
from llmsurgeon.model.spec import LayerSpec
from llmsurgeon.operations import OPERATIONS, Step, Subject
from llmsurgeon.operations.base import Offer

AS_IT_IS = "as it is"


@dataclass(frozen=True)
class Option:
    """What may stand in the place of some neighbouring layers of the parent, or of its table.

    layers: the parent's; the table counts as one behind the last.
    offers: at most one for the attention and one for the FFN of a layer, or one for all of them, or for the table; none
    where it stays as it is.
    instead: what then stands there; nothing where they are gone.
    """

    layers: tuple[int, ...]
    offers: tuple[Offer, ...] = ()
    instead: tuple[LayerSpec, ...] = ()

    @property
    def name(self) -> str:
        """What is left, in a few words."""
        return ", ".join(offer.name for offer in self.offers) or AS_IT_IS

    @property
    def rows(self) -> int | None:
        """How many rows the table has then, where it is about that and they are fewer."""
        return next((offer.rows for offer in self.offers), None)

    @property
    def changed(self) -> bool:
        """True where something is done."""
        return bool(self.offers)

    @property
    def single(self) -> bool:
        """True where one offer makes it."""
        return len(self.offers) == 1

    @property
    def op(self) -> str:
        """The operation that makes it, where one offer does."""
        return self.offers[0].steps[-1].op

    @cached_property
    def key(self) -> str:
        """What it is called in files of scores: the steps that make it."""
        return _spelled(steps_of([self]))

    def parts(self) -> tuple[Option, ...]:
        """An option for each of its offers alone."""
        return tuple(Option(self.layers, (offer,)) for offer in self.offers)


def rows_of(options: Iterable[Option]) -> int | None:
    """How many rows the table of a model of these options has, where they are fewer than the parent's."""
    return next((option.rows for option in options if option.rows), None)


def steps_of(options: Iterable[Option]) -> tuple[Step, ...]:
    """The steps of a recipe that make these options, in the order of the table of operations."""
    by_op: dict[str, list[Step]] = {}
    for option in options:
        for offer in option.offers:
            for step in offer.steps:
                by_op.setdefault(step.op, []).append(step)
    return tuple(step for op, kind in OPERATIONS.items() if op in by_op for step in kind.merged(by_op[op]))


def key_of(options: Iterable[Option]) -> str:
    """The steps that make these options as one line of JSON, defaults left out."""
    some = list(options)
    return some[0].key if len(some) == 1 else _spelled(steps_of(some))


def _spelled(steps: Sequence[Step]) -> str:
    said = [step.model_dump(mode="json", exclude_defaults=True) | {"op": step.op} for step in steps]
    return json.dumps(said, separators=(",", ":"))


def offered(subject: Subject, grain: int, operations: Collection[str]) -> list[Offer]:
    """What these operations offer of a model, as far as its family and its layers bear them."""
    found: list[Offer] = []
    for op, step in OPERATIONS.items():
        if op in operations and step.declined(subject.family) is None:
            found += step.offers(subject, grain)
    return [offer for offer in found if _borne(subject, offer)]


def _borne(subject: Subject, offer: Offer) -> bool:
    try:
        for step in offer.steps:
            subject.check(step)
    except SurgeryError:
        return False
    return True


def combined(layers: int, offers: Sequence[Offer]) -> list[Option]:
    """Every option of a model of so many layers: of each layer first that it stays as it is."""
    options: list[Option] = []
    for layer in range(layers):
        mine = [offer for offer in offers if offer.layers[:1] == (layer,)]
        attention, ffn = ([(), *((o,) for o in mine if o.part == part)] for part in ("attention", "ffn"))
        options += [Option((layer,), (*a, *f)) for a, f in product(attention, ffn)]
        options += [Option(offer.layers, (offer,)) for offer in mine if offer.part == "all"]
    return options


def tables(layers: int, offers: Sequence[Offer]) -> list[Option]:
    """The options of the table of a model of so many layers, first that it stays as it is; none where nothing is."""
    changed = [Option((layers,), (offer,)) for offer in offers if offer.part == "table"]
    return [Option((layers,)), *changed] if changed else []


@dataclass(frozen=True)
class Cut:
    """A parent with some options made, none of which has a layer beside another's.

    subject, weights: the cut model, unhealed.
    """

    options: tuple[Option, ...]
    subject: Subject
    weights: Mapping[str, Tensor]

    @classmethod
    def of(cls, parent: Subject, weights: Mapping[str, Tensor], options: Sequence[Option]) -> Cut:
        """Plan the steps of these options.

        Raises:
            SurgeryError: one of them does not fit the model.
        """
        subject = parent
        for step in steps_of(options):
            planned = step.resolve(subject).plan(subject)
            weights = TransformedWeights(weights, planned.transforms)
            subject = subject.after(planned)
        return cls(tuple(options), subject, weights)

    def places(self, option: Option) -> list[int]:
        """Where what stands in an option's place is in the cut model."""
        layers = self.subject.spec.layers
        return [index for index, layer in enumerate(layers) if set(layer.parents) <= set(option.layers)]

    def instead(self, option: Option) -> tuple[LayerSpec, ...]:
        """What stands in an option's place."""
        return tuple(self.subject.spec.layers[index] for index in self.places(option))


def apart(options: Iterable[Option]) -> list[list[Option]]:
    """The options in a few lists: each is taken into the first that has none of its layers, nor a neighbour of them."""
    lists: list[tuple[set[int], list[Option]]] = []
    for option in options:
        around = set(range(option.layers[0] - 1, option.layers[-1] + 2))
        free = next((each for each in lists if not each[0] & around), None)
        if free is None:
            free = (set(), [])
            lists.append(free)
        free[0].update(option.layers)
        free[1].append(option)
    return [mine for _, mine in lists]


def cuts(parent: Subject, weights: Mapping[str, Tensor], options: Sequence[Option]) -> list[Cut]:
    """All options that the model bears, planned together as far as they do not touch; `instead` is filled in."""
    made: list[Cut] = []
    # Alike options of all layers stand together.
    changed = [option for option in options if option.changed and not option.rows]
    alike = sorted(changed, key=lambda option: _kind(option, options))
    for group in apart(alike):
        for cut in _planned(parent, weights, group):
            filled = [replace(option, instead=cut.instead(option)) for option in cut.options]
            # Where both parts went, nothing stands there: the offer of the whole layer says so.
            kept = tuple(option for option in filled if option.instead or option.single)
            made.append(replace(cut, options=kept))
    return made


def _planned(parent: Subject, weights: Mapping[str, Tensor], group: Sequence[Option]) -> list[Cut]:
    """The group as one cut; where something in it is refused, each option that is not, alone."""
    try:
        return [Cut.of(parent, weights, group)]
    except SurgeryError:
        if len(group) == 1:
            return []
        return [cut for option in group for cut in _planned(parent, weights, [option])]


def _kind(option: Option, options: Sequence[Option]) -> tuple[Any, ...]:
    return (option.name if len(option.layers) == 1 else f"run of {len(option.layers)}", option.layers)


def stays(parent: Subject, layer: int) -> Option:
    """The option that a layer stays as it is."""
    return Option((layer,), (), (parent.spec.layers[layer],))
