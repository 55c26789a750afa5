"""The chosen model made: its recipe, run and timed, and the budget corrected by what it missed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from llmsurgeon.evaluation.decoders import Evaluation
from llmsurgeon.evaluation.encoders import EncoderEvaluation
from llmsurgeon.operations.distill import Distill
from llmsurgeon.operations.refit import Refit
from llmsurgeon.planning.options import Options
from llmsurgeon.progress import Say
from llmsurgeon.recipe.recipe import Calibration, Recipe, dump
from llmsurgeon.run import run
from llmsurgeon.searching.options import steps_of
from llmsurgeon.searching.seeking import Model, Seeker

# A budget counts as met within this share; a result that is further below it leaves quality on the table.
TOLERANCE = 0.01
# How often a model is made before the one that came nearest is taken.
TIMES = 3


@dataclass(frozen=True)
class Made:
    """A model that was written and measured: what it costs for each target, and how good it is on held-out text."""

    model: Model
    costs: tuple[float, ...]
    evaluation: Evaluation | EncoderEvaluation | None


@dataclass(frozen=True)
class Place:
    """What recipes say of their model and text, and the folder in which models are made."""

    name: str
    revision: str | None
    calibration: Calibration
    scratch: Path


@dataclass(frozen=True)
class Making:
    """How models are made. seeker: knows the space; heal: minutes of training that recipes end with."""

    seeker: Seeker
    place: Place
    heal: float | None
    options: Options

    def recipe(self, model: Model) -> Recipe:
        """The recipe that makes a model: its cuts, one refit of the whole, and training where that was asked for."""
        space = self.seeker.space
        options = [space.options[place] for place in model.places]
        told = ", ".join(meter.say(total) for meter, total in zip(space.meters, space.total(model.places), strict=True))
        heals = [Refit(), *([Distill(minutes=self.heal)] if self.heal else [])]
        return Recipe(
            version=1,
            description=f"found by llmsurgeon search: {told}",
            model=self.place.name,
            calibration=self.place.calibration,
            steps=(*steps_of(options), *heals),
        )

    def make(self, model: Model) -> Made:
        """Run a model's recipe without the training, and measure what it costs."""
        recipe = self.recipe(model)
        cut = recipe.model_copy(update={"steps": tuple(step for step in recipe.steps if not step.trains)})
        # A name of its own: a run that was killed goes on.
        out = self.place.scratch / f"made-{sha256(dump(cut).encode()).hexdigest()[:16]}"
        outcome = run(cut, None, out, replace(self.options, overwrite=True), self.place.revision)
        parent = self.seeker.space.parent.original
        path = Path(parent.checkpoint.path)  # type: ignore[attr-defined]
        costs = tuple(meter.measured(out, path) for meter in self.seeker.space.meters)
        shutil.rmtree(out, ignore_errors=True)
        return Made(model, costs, outcome.evaluation)

    def best(self, in_time: Callable[[], bool], say: Say) -> list[Made]:
        """Models made one after the other, each for a budget corrected by what the one before missed, the best first.

        Those that meet every target come before those that do not; among them the KL decides.
        """
        meters = self.seeker.space.meters
        tightened, made = [1.0] * len(meters), list[Made]()
        for _ in range(TIMES):
            model = self.seeker.seek(tightened)
            if any(model.places == each.model.places for each in made):
                break
            made.append(self.make(model))
            for meter, cost in zip(meters, made[-1].costs, strict=True):
                say(f"made: {meter.say(cost)}, of at most {meter.amount(meter.budget())}")
            missed = [cost / meter.budget() for meter, cost in zip(meters, made[-1].costs, strict=True)]
            if all(meter.exact or abs(m - 1) <= TOLERANCE for meter, m in zip(meters, missed, strict=True)):
                break
            if not in_time():
                break
            tightened = [t if meter.exact else t / m for t, meter, m in zip(tightened, meters, missed, strict=True)]
        return sorted(made, key=lambda each: (self.excess(each.costs), each.model.measured.kl))

    def excess(self, costs: Sequence[float]) -> float:
        """By what share the worst target is missed; 0 where all are met."""
        meters = self.seeker.space.meters
        worst = max(cost / meter.budget() - 1 for meter, cost in zip(meters, costs, strict=True))
        return worst if worst > TOLERANCE else 0.0
