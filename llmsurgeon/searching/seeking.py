"""The search itself: options foreseen and scored, the program over them, whole models measured, scores corrected."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from llmsurgeon.errors import SurgeryError
from llmsurgeon.progress import Say, spoken
from llmsurgeon.searching.found import SHORT
from llmsurgeon.searching.options import Option
from llmsurgeon.searching.scoring import Measured, Scorer
from llmsurgeon.searching.solving import corrected
from llmsurgeon.searching.space import Space

# Whole models that are measured in each round, unlike each other by this share of the layers; rounds at most, and
# those without a better model after which the search ends.
A_ROUND, OVERLAPS, ROUNDS, PATIENCE = 6, (0.8, 0.9), 8, 2
# Options of an operation that are measured and foreseen before the others are taken for so many times what is foreseen.
ENOUGH = 5
# How far a sum of corrected scores may miss what was measured, as a share of it.
SURE = 0.1


@dataclass(frozen=True, eq=False)
class Model:
    """One whole model: places of its options, what they were thought to score together, and what it was measured at."""

    places: tuple[int, ...]
    predicted: float
    measured: Measured


@dataclass
class Seeker:
    """Looks for the best model in a space.

    alone: what each option costs, NaN where nothing tells; scores: the same, corrected by whole models.
    models: those that were measured.
    """

    space: Space
    scorer: Scorer
    in_time: Callable[[], bool]
    say: Say
    models: dict[tuple[int, ...], Model] = field(default_factory=dict)

    def score(self, in_time: Callable[[], bool], seconds: Callable[[], float]) -> None:
        """Foresee what every option costs that one offer makes, and measure those that the best choice stands on.

        Tables are measured, of which there are few. Of the others as many are foreseen as there is time for.

        Args:
            seconds: about how long all of it takes, where nothing was foreseen that would tell.

        Raises:
            SurgeryError: time was up before enough was known to meet the targets.
        """
        todo = self.space.in_turn(self.unscored)
        start = time.monotonic()
        options = [self.space.options[place] for place in todo]
        self.scorer.measure([[option] for option in options if option.rows], "score vocabularies", in_time)
        self.scorer.foresee([option for option in options if not option.rows], in_time)
        took, left = time.monotonic() - start, self.unscored
        budgets = [1.0] * len(self.space.meters)
        if self._choice(self.scores(), budgets) is not None:
            self._measure_chosen(budgets, in_time)
            return
        done, count = len(todo) - len(left), sum(option.single for option in self.space.options)
        more = took / done * len(left) if done else seconds() * len(left) / count
        raise SurgeryError(
            f"search: time was up when {count - len(left)} of {count} options were scored, of which none meet the "
            f"targets; the others take about {spoken(more)} here. What was scored is kept: the same command goes on "
            "with more --minutes (or start anew with fewer --tokens)"
        )

    def _choice(self, scores: NDArray[np.float64], tightened: Sequence[float]) -> tuple[int, ...] | None:
        """Places of the options of least summed score; None where nothing is within the budgets."""
        program, kept = self.space.program(scores, tightened)
        best = program.best()
        return None if best is None else tuple(kept[place] for place in best)

    def _measure_chosen(self, tightened: Sequence[float], in_time: Callable[[], bool]) -> None:
        """Measure what the best choice stands on and was only foreseen, until nothing of it is that, or time is up.

        Whatever is chosen among many that are foreseen is foreseen too well: chance had a part in it.
        """
        single = [option for option in self.space.options if option.single]
        while in_time():
            chosen = self._choice(self.scores(), tightened) or ()
            offers = {offer for place in chosen for offer in self.space.options[place].offers}
            unsure = [o for o in single if o.offers[0] in offers and self.scorer.known([o]) is None]
            if not unsure:
                return
            self.scorer.measure([[option] for option in unsure], "score what is chosen", in_time)

    @property
    def unscored(self) -> list[int]:
        """Places of the options that one offer makes and that were neither measured nor foreseen."""
        options, scorer = self.space.options, self.scorer
        single = [place for place, option in enumerate(options) if option.single]
        return [p for p in single if scorer.known([options[p]]) is None and scorer.foreseen(options[p]) is None]

    def alone(self) -> NDArray[np.float64]:
        """What each option costs alone: as measured, as foreseen, or the sum of its offers."""
        more = self.more_than_foreseen()
        return np.array([self._alone(option, more) for option in self.space.options])

    def _alone(self, option: Option, more: Mapping[str, float]) -> float:
        found = self.scored(option, more)
        if found is not None:
            return found.kl
        parts = [self.scored(part, more) for part in option.parts()]
        return sum(part.kl if part else float("nan") for part in parts)

    def scored(self, option: Option, more: Mapping[str, float]) -> Measured | None:
        """What an option costs alone: as measured, or as foreseen and so many times `more`; None where neither was."""
        found = self.scorer.known([option])
        if found is None and option.single:
            foreseen = self.scorer.foreseen(option)
            if foreseen is not None:
                found = Measured.of(foreseen.each * more.get(option.op, 1.0))
        return found

    def more_than_foreseen(self) -> dict[str, float]:
        """By operation, how many times what was foreseen options were measured at, by the median of those that were."""
        ratios: dict[str, list[float]] = defaultdict(list)
        for option in self.space.options:
            known, foreseen = self.scorer.known([option]), self.scorer.foreseen(option)
            if known and foreseen and known.kl > 0 and foreseen.kl > 0:
                ratios[option.op].append(known.kl / foreseen.kl)
        return {kind: float(np.median(each)) for kind, each in ratios.items() if len(each) >= ENOUGH}

    def seek(self, tightened: Sequence[float]) -> Model | None:
        """The best model that was measured within the budgets, `tightened` times; None where nothing is within them.

        Each round measures the best models that the scores know of, and corrects the scores by them.
        """
        self._measure_chosen(tightened, self.in_time)
        best, without = self._best(tightened), 0
        for round_ in range(ROUNDS):
            new = [places for places in self._proposals(tightened) if places not in self.models]
            self._measure(new)
            found = self._best(tightened)
            without = without + 1 if found is best else 0
            best = found
            if best is not None:
                short = SHORT[self.space.distance]
                self.say(f"round {round_ + 1}: {short} {_kl(best):.4f} (sum of single scores {best.predicted:.4f})")
            if without == PATIENCE or not new or not self.in_time():
                break
        self._measure_likeliest(tightened)
        return self._best(tightened)

    def _measure_likeliest(self, tightened: Sequence[float]) -> None:
        """Measure the model that the scores take for the best, though time is up: it is one walk.

        What was measured before it may be of one operation alone, and far from the best.
        """
        likeliest = self._choice(self.scores(), tightened)
        if likeliest is not None and likeliest not in self.models:
            self._measure([likeliest], lambda: True)

    def _best(self, tightened: Sequence[float]) -> Model | None:
        """Of the models that were measured the best one within the budgets."""
        meters = self.space.meters
        most = [meter.budget() * share * (1 + 1e-9) for meter, share in zip(meters, tightened, strict=True)]
        within = (
            model
            for model in self.models.values()
            if all(cost <= budget for cost, budget in zip(self.space.total(model.places), most, strict=True))
        )
        return min(within, key=_kl, default=None)

    def compare(self, tightened: Sequence[float]) -> dict[str, Model]:
        """The best model that each operation makes alone, where it reaches the targets; by its name.

        They stand beside the result, and the corrections learn of them.
        """
        found: dict[str, tuple[int, ...]] = {}
        scores = self.alone()
        for op in self.space.operations:
            mine = [not o.changed or (o.single and o.op == op) for o in self.space.options]
            chosen = self._choice(np.where(mine, scores, np.nan), tightened)
            if chosen is not None:
                found[op] = chosen
        self._measure([places for places in found.values() if places not in self.models])
        return {op: self.models[places] for op, places in found.items() if places in self.models}

    def _proposals(self, tightened: Sequence[float]) -> list[tuple[int, ...]]:
        """The best models by the scores as they are corrected now, some of them unlike each other."""
        program, kept = self.space.program(self.scores(), tightened)
        found: dict[tuple[int, ...], None] = {}
        for overlap in OVERLAPS:
            for chosen in program.several(A_ROUND // len(OVERLAPS), overlap):
                found[tuple(kept[place] for place in chosen)] = None
        return list(found)

    def scores(self) -> NDArray[np.float64]:
        """The options' scores, corrected by every model that was measured."""
        alone = self.alone()
        known = np.where(np.isfinite(alone), alone, 0.0)
        models = list(self.models.values())
        if not models:
            return alone
        moved = corrected(known, [model.places for model in models], [_kl(model) for model in models], SURE)
        return np.where(np.isfinite(alone), moved, np.nan)

    def _measure(self, models: Sequence[tuple[int, ...]], in_time: Callable[[], bool] | None = None) -> None:
        alone = self.alone()
        options = [[self.space.options[place] for place in places] for places in models]
        # What stands in a model in a layer of two offers is measured alone, too: their sum was a guess.
        pairs = {option: None for each in options for option in each if len(option.offers) > 1}
        self.scorer.measure([[option] for option in pairs], "score pairs")
        self.scorer.measure(options, "measure models", in_time)
        for places, each in zip(models, options, strict=True):
            measured = self.scorer.known(each)
            if measured is not None:
                self.models[places] = Model(places, float(sum(alone[place] for place in places)), measured)


def _kl(model: Model) -> float:
    return model.measured.kl
