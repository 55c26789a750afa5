"""The search itself: single scores, the program over them, whole models measured, scores corrected, and again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
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

    alone: what each option was measured at, NaN where it was not; scores: the same, corrected by whole models.
    models: those that were measured.
    """

    space: Space
    scorer: Scorer
    in_time: Callable[[], bool]
    say: Say
    models: dict[tuple[int, ...], Model] = field(default_factory=dict)

    def score(self, in_time: Callable[[], bool], seconds: Callable[[], float]) -> None:
        """Measure every option that one offer makes, or as many as there is time for.

        Args:
            seconds: about how long all of them take, where none was measured that would tell.

        Raises:
            SurgeryError: time was up before enough was known to meet the targets.
        """
        todo = self.unscored
        start = time.monotonic()
        self.scorer.measure(
            [[self.space.options[place]] for place in self.space.in_turn(todo)], "score options", in_time
        )
        took, left = time.monotonic() - start, self.unscored
        program, _ = self.space.program(self.alone(), [1.0] * len(self.space.meters))
        if program.best() is not None:
            return
        done, count = len(todo) - len(left), sum(option.single for option in self.space.options)
        more = took / done * len(left) if done else seconds() * len(left) / count
        raise SurgeryError(
            f"search: time was up when {count - len(left)} of {count} options were scored, of which none meet the "
            f"targets; the others take about {spoken(more)} here. What was scored is kept: the same command goes on "
            "with more --minutes (or start anew with fewer --tokens)"
        )

    @property
    def unscored(self) -> list[int]:
        """Places of the options that one offer makes and that were not measured."""
        options = self.space.options
        return [p for p, option in enumerate(options) if option.single and self.scorer.known([option]) is None]

    def alone(self) -> NDArray[np.float64]:
        """What each option costs alone: as measured, or the sum of its offers."""
        return np.array([self._alone(option) for option in self.space.options])

    def _alone(self, option: Option) -> float:
        found = self.scorer.known([option])
        if found is not None:
            return found.kl
        parts = [self.scorer.known([part]) for part in option.parts()]
        return sum(part.kl if part else float("nan") for part in parts)

    def seek(self, tightened: Sequence[float]) -> Model | None:
        """The best model that was measured within the budgets, `tightened` times; None where nothing is within them.

        Each round measures the best models that the scores know of, and corrects the scores by them.
        """
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
        return best or self._likeliest(tightened)

    def _likeliest(self, tightened: Sequence[float]) -> Model | None:
        """The model of least summed score, measured though time is up: it is one walk."""
        proposals = self._proposals(tightened)[:1]
        self._measure(proposals, lambda: True)
        return self.models[proposals[0]] if proposals else None

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
        for op in dict.fromkeys(o.offers[0].steps[-1].op for o in self.space.options if o.single):
            mine = [not o.changed or (o.single and o.offers[0].steps[-1].op == op) for o in self.space.options]
            program, kept = self.space.program(np.where(mine, scores, np.nan), tightened)
            chosen = program.best()
            if chosen is not None:
                found[op] = tuple(kept[place] for place in chosen)
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
