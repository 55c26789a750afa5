"""The chosen model made: its recipe, run and timed, and the budget corrected by what it missed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from llmsurgeon.errors import SurgeryError
from llmsurgeon.evaluation.decoders import Evaluation
from llmsurgeon.evaluation.encoders import EncoderEvaluation
from llmsurgeon.operations import Step
from llmsurgeon.operations.distill import Distill
from llmsurgeon.operations.refit import Refit
from llmsurgeon.operations.trim_vocab import KeepTokens, TrimVocab
from llmsurgeon.planning.options import Options
from llmsurgeon.processes.first import from_first
from llmsurgeon.processes.world import first
from llmsurgeon.progress import Say
from llmsurgeon.recipe.recipe import Calibration, Recipe, dump
from llmsurgeon.run import run
from llmsurgeon.searching.options import rows_of, steps_of
from llmsurgeon.searching.seeking import Model, Seeker

# A budget counts as met within this share; a result that is further below it leaves quality on the table.
TOLERANCE = 0.01
# How often a model is made before the one that came nearest is taken.
TIMES = 3
# How often a model's shape is timed, and another chosen, before it is made.
SETTLING = 4
# The list of tokens that stay, beside a recipe that trims the vocabulary.
TOKENS = "tokens.json"


@dataclass(frozen=True)
class Made:
    """A model that was written and measured: what it costs for each target, and how good it is on held-out text.

    folder: where it lies, as long as it is kept.
    """

    model: Model
    folder: Path
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
    """How models are made. seeker: knows the space; heal: minutes of training that recipes end with.

    home: where the best one that was made is to lie in the end, which is then kept.
    """

    seeker: Seeker
    place: Place
    heal: float | None
    options: Options
    home: Path | None = None

    def files(self, model: Model) -> dict[str, str]:
        """What a model's recipe reads of its own: the list of the tokens that stay, where some go."""
        rows = self._rows(model)
        vocabularies = self.seeker.scorer.vocabularies
        return {TOKENS: vocabularies.listed(rows)} if rows and vocabularies else {}

    def _rows(self, model: Model) -> int | None:
        return rows_of(self.seeker.space.options[place] for place in model.places)

    def recipe(self, model: Model, folder: Path) -> Recipe:
        """The recipe that makes a model: its cuts, one refit of the whole, and training where that was asked for.

        folder: where its `files` lie.
        """
        space, rows = self.seeker.space, self._rows(model)
        heals: list[Step] = [Refit()]
        if self.heal:
            # What it leaves open is as the parent asks for: a recipe writes all of it out.
            heals.append(Distill(minutes=self.heal).resolve(space.parent.subject({})))
        options = [space.options[place] for place in model.places if not space.options[place].rows]
        trims = [TrimVocab(keep=KeepTokens(file=f"{folder}/{TOKENS}"), rows=rows)] if rows else []
        told = ", ".join(meter.say(total) for meter, total in zip(space.meters, space.total(model.places), strict=True))
        return Recipe(
            version=1,
            description=f"found by llmsurgeon search: {told}",
            model=self.place.name,
            calibration=self.place.calibration,
            steps=(*trims, *steps_of(options), *heals),
        )

    def make(self, model: Model) -> Made:
        """Run a model's recipe without the training, and measure what it costs."""
        from_first(lambda: self._write_files(model))
        recipe = self.recipe(model, self.place.scratch)
        cut = recipe.model_copy(update={"steps": tuple(step for step in recipe.steps if not step.trains)})
        # A name of its own: a run that was killed goes on.
        out = self.place.scratch / f"made-{sha256(dump(cut).encode()).hexdigest()[:16]}"
        outcome = run(cut, None, out, replace(self.options, overwrite=True, home=self.home), self.place.revision)
        parent = self.seeker.space.parent.original
        path = Path(parent.checkpoint.path)
        costs = tuple(meter.measured(out, path) for meter in self.seeker.space.meters)
        return Made(model, out, costs, outcome.evaluation)

    def _write_files(self, model: Model) -> None:
        for name, content in self.files(model).items():
            (self.place.scratch / name).write_text(content, encoding="utf-8")

    def best(self, in_time: Callable[[], bool], say: Say) -> tuple[Model, list[Made]]:
        """The best of models made one after the other, each for a budget corrected by what the one before missed.

        Those that meet every target come before those that do not; among them the KL decides. None is made when time
        is up before the first. Returns the best one, and all that were made, the best first.
        """
        meters = self.seeker.space.meters
        tightened, made = [1.0] * len(meters), list[Made]()
        for _ in range(TIMES):
            model = self._settled(tightened, in_time)
            if model is None:
                break
            if not made and not in_time():
                return model, []
            if any(model.places == each.model.places for each in made):
                break
            latest = self.make(model)
            made = sorted([*made, latest], key=self._rank)
            self._remove(made if self.home is None else made[1:])
            for meter, cost in zip(meters, latest.costs, strict=True):
                say(f"made: {meter.say(cost)}, of at most {meter.amount(meter.budget())}")
            missed = [cost / meter.budget() for meter, cost in zip(meters, latest.costs, strict=True)]
            if all(meter.exact or abs(m - 1) <= TOLERANCE for meter, m in zip(meters, missed, strict=True)):
                break
            if not in_time():
                break
            tightened = [t if meter.exact else t / m for t, meter, m in zip(tightened, meters, missed, strict=True)]
        if not made:
            self.seeker.space.check_reach()
            raise SurgeryError(
                "search: of what is scored so far nothing meets the targets; the same command goes on with the others"
            )
        return made[0].model, made

    def _rank(self, made: Made) -> tuple[float, float]:
        """The less, the better."""
        return self.excess(made.costs), made.model.measured.kl

    def _remove(self, made: Sequence[Made]) -> None:
        if first():
            for each in made:
                shutil.rmtree(each.folder, ignore_errors=True)

    def _settled(self, tightened: Sequence[float], in_time: Callable[[], bool]) -> Model | None:
        """The best model, once one of its shape was timed: what layers of many shapes cost together no part tells."""
        seeker = self.seeker
        model = seeker.seek(tightened)
        for _ in range(SETTLING):
            if model is None or all(meter.exact for meter in seeker.space.meters) or not in_time():
                break
            thought = seeker.space.total(model.places)
            seeker.space = seeker.space.learnt(model.places)
            known = seeker.space.total(model.places)
            if all(abs(now / before - 1) <= TOLERANCE / 2 for now, before in zip(known, thought, strict=True)):
                break
            # Where nothing is left within the budgets, the nearest is what was found before.
            model = seeker.seek(tightened) or model
        return model

    def excess(self, costs: Sequence[float]) -> float:
        """By what share the worst target is missed; 0 where all are met."""
        meters = self.seeker.space.meters
        worst = max(cost / meter.budget() - 1 for meter, cost in zip(meters, costs, strict=True))
        return worst if worst > TOLERANCE else 0.0
