"""What each option costs the model: KL(parent || parent with this option alone), each after its own fit.

The replace-one score of Puzzle (arXiv 2411.19146, section 3), measured on text that fitted nothing; and the same of
whole models, of many options at once. Layers are walked with one layer's weights in memory, all options side by side.
What an option will cost is foreseen first (`foresight`): that takes its own layer alone.
A model with another vocabulary is walked over its own tokens, and costs what those cost beside its KL (`vocabulary`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmsurgeon.analysis.divergence import divergences
from llmsurgeon.evaluation.perplexity import mean_interval
from llmsurgeon.processes.exchange import things
from llmsurgeon.processes.world import alone, count, rank
from llmsurgeon.progress import Progress
from llmsurgeon.searching.fitting import Workshop
from llmsurgeon.searching.foresight import Foresight
from llmsurgeon.searching.ground import Ground, Reading
from llmsurgeon.searching.options import Option, key_of, rows_of
from llmsurgeon.searching.store import ScoreStore
from llmsurgeon.searching.vocabulary import Vocabularies
from llmsurgeon.walk.streams import Streams

# Models that are walked side by side in a process: after each such lot what was found is kept.
SIDE_BY_SIDE = 24
# Options that are foreseen in a process before they are kept, and what stands before the keys of those.
FORESEEN_AT_ONCE = 8
FORESEEN = "foreseen "


@dataclass(frozen=True, eq=False)
class Measured:
    """A KL in nats a token of the parent's with its 95 % interval over sequences, and that of each sequence."""

    kl: float
    low: float
    high: float
    each: Tensor

    @classmethod
    def of(cls, each: Tensor) -> Measured:
        """From each sequence's mean."""
        mean = float(each.double().mean())
        low, high = mean_interval(each) or (mean, mean)
        return cls(mean, low, high, each)


UNCHANGED = Measured(0.0, 0.0, 0.0, torch.zeros(1))


class Scorer:
    """Measures models that have some options in the place of the parent's layers, and remembers what it measured.

    vocabularies: those that may stand in the place of the parent's, where any may.
    """

    def __init__(
        self,
        ground: Ground,
        workshop: Workshop,
        store: ScoreStore,
        in_time: Callable[[], bool],
        vocabularies: Vocabularies | None = None,
    ) -> None:
        self.ground, self.workshop, self.store, self.in_time = ground, workshop, store, in_time
        self.vocabularies = vocabularies

    def reading(self, rows: int | None) -> Reading:
        """The scoring text as a vocabulary of so many rows cuts it, or the parent's."""
        if rows is None:
            return self.ground.reading
        assert self.vocabularies
        return self.vocabularies.reading(rows)

    def known(self, options: Sequence[Option]) -> Measured | None:
        """The KL of the model with these options, where it was measured."""
        changed = [option for option in options if option.changed]
        if not changed:
            return UNCHANGED
        each = self.store.found(key_of(changed))
        return None if each is None else Measured.of(each)

    def foreseen(self, option: Option) -> Measured | None:
        """What an option is foreseen to cost alone, where it was foreseen."""
        each = self.store.found(FORESEEN + option.key)
        return None if each is None else Measured.of(each)

    def foresee(self, options: Sequence[Option], in_time: Callable[[], bool]) -> None:
        """Foresee what options of one offer cost, the first ones first, as many as there is time for."""
        todo = [option for option in options if self.known([option]) is None and self.foreseen(option) is None]
        size, foresight = FORESEEN_AT_ONCE * count(), Foresight(self.ground, self.workshop)
        with Progress("foresee options", float(len(todo)), "options") as progress:
            for start in range(0, len(todo), size):
                if not in_time():
                    return
                lot = todo[start : start + size]
                with alone():
                    found = {}
                    for option in lot[rank() :: count()]:
                        found[FORESEEN + option.key] = foresight.of(option)
                        progress.advance()
                parts = things(found)
                progress.advance(float(len(lot) - len(found)))
                self.store.keep({key: each for part in parts for key, each in part.items()})

    def measure(
        self, models: Sequence[Sequence[Option]], title: str, in_time: Callable[[], bool] | None = None
    ) -> None:
        """Measure models, each the options in it that are changed, in layer order; those that are known are left out.

        The first models come first, a lot at a time. Stops early, with what it has, when time is up; `in_time` says so
        where it is not the search's own.
        """
        lots = self._lots(models)
        work = float(sum(map(len, lots)) * len(self.ground.runner.layers))
        with Progress(title, work, "layers") as progress:
            for lot in lots:
                if not (in_time or self.in_time)():
                    return
                self._measure(lot, progress)

    def _lots(self, models: Sequence[Sequence[Option]]) -> list[dict[str, list[Option]]]:
        """The models that are not known, by their keys, in lots of one vocabulary each."""
        by_rows: dict[int | None, dict[str, list[Option]]] = defaultdict(dict)
        for options in models:
            if self.known(options) is None:
                rows = rows_of(options)
                by_rows[rows][key_of(options)] = [option for option in options if option.changed]
        lots = []
        for mine in by_rows.values():
            some, size = list(mine.items()), SIDE_BY_SIDE * count()
            lots += [dict(some[start : start + size]) for start in range(0, len(some), size)]
        return lots

    def _measure(self, lot: dict[str, list[Option]], progress: Progress) -> None:
        """Measure a lot, of which each process has its part, and keep what it was measured at."""
        rows = rows_of(option for options in lot.values() for option in options)
        reading = self.reading(rows)
        mine = dict(list(lot.items())[rank() :: count()])
        with alone():
            found = self._found(mine, reading, progress)
        parts = things(found)
        progress.advance(float(len(lot) - len(mine)) * len(self.ground.runner.layers))
        together = {key: each for part in parts for key, each in part.items()}
        self.store.keep({key: together[key] for key in lot})

    def _found(self, lot: dict[str, list[Option]], reading: Reading, progress: Progress) -> dict[str, Tensor]:
        """What each model of a lot is measured at."""
        inside = {key: [option for option in options if not option.rows] for key, options in lot.items()}
        found = {key: reading.lost for key in lot}
        changed = {key: options for key, options in inside.items() if options}
        if changed:
            kl = self._walk(list(changed.values()), reading, progress)
            found |= {key: reading.lost + reading.longer * each for key, each in zip(changed, kl, strict=True)}
        return found

    def _walk(self, models: list[list[Option]], reading: Reading, progress: Progress) -> Tensor:
        """KL of each model on each sequence, [models, S], in nats a token of the reading's."""
        runner = self.ground.runner
        streams = Streams(len(models), tuple(reading.left.shape), reading.left.dtype).data
        starts = [min(options[0].layers[0], len(reading.entered) - 1) for options in models]
        covers = [{layer: option for option in options for layer in option.layers} for options in models]
        with torch.no_grad():
            for index in range(min(starts), len(runner.layers)):
                for model, start in enumerate(starts):
                    if start == index:
                        streams[model] = reading.entered[index]
                running = [model for model, start in enumerate(starts) if start <= index]
                self._layer(index, [model for model in running if index not in covers[model]], streams)
                for option in dict.fromkeys(covers[m][index] for m in running if index in covers[m]):
                    # An option over several layers is done at its first.
                    if option.layers[0] == index:
                        mine = [model for model in running if covers[model].get(index) == option]
                        self._option(option, mine, streams)
                progress.advance(len(models) if index > min(starts) else len(models) * (index + 1))
        rows = [len(reading.left)] * len(models)
        return divergences(runner, streams, rows, reading.left, reading.kept, reading.lengths)

    def _layer(self, index: int, models: list[int], streams: Tensor) -> None:
        """The parent's layer, in the models that have it."""
        if not models:
            return
        runner = self.ground.runner
        with runner.loaded(index):
            for model in models:
                for part in self.ground.parts:
                    streams[model, part] = runner.whole(index, streams[model, part].to(runner.device)).cpu()

    def _option(self, option: Option, models: list[int], streams: Tensor) -> None:
        """An option, in the models that have it."""
        with self.workshop.standing(option) as beside:
            for model in models:
                for part in self.ground.parts:
                    entered = streams[model, part].to(beside.device)
                    streams[model, part] = self.workshop.through(option, beside, entered).cpu()
