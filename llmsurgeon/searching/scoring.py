"""What each option costs the model: KL(parent || parent with this option alone), each after its own fit.

The replace-one score of Puzzle (arXiv 2411.19146, section 3), measured on text that fitted nothing; and the same of
whole models, of many options at once. Layers are walked with one layer's weights in memory, all options side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmsurgeon.analysis.divergence import divergences
from llmsurgeon.evaluation.perplexity import mean_interval
from llmsurgeon.progress import Progress
from llmsurgeon.searching.fitting import Workshop
from llmsurgeon.searching.ground import Ground
from llmsurgeon.searching.options import Option, key_of
from llmsurgeon.searching.store import ScoreStore
from llmsurgeon.walk.streams import Streams

# Models that are walked side by side: after each such lot what was found is kept.
SIDE_BY_SIDE = 24


@dataclass(frozen=True, eq=False)
class Measured:
    """A KL in nats a token with its 95 % interval over sequences, and that of each sequence."""

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
    """Measures models that have some options in the place of the parent's layers, and remembers what it measured."""

    def __init__(self, ground: Ground, workshop: Workshop, store: ScoreStore, in_time: Callable[[], bool]) -> None:
        self.ground, self.workshop, self.store, self.in_time = ground, workshop, store, in_time

    def known(self, options: Sequence[Option]) -> Measured | None:
        """The KL of the model with these options, where it was measured."""
        changed = [option for option in options if option.changed]
        if not changed:
            return UNCHANGED
        each = self.store.found(key_of(changed))
        return None if each is None else Measured.of(each)

    def measure(self, models: Sequence[Sequence[Option]], title: str) -> None:
        """Measure models, each the options in it that are changed, in layer order; those that are known are left out.

        Stops early, with what it has, when time is up.
        """
        todo = {key_of(options): [o for o in options if o.changed] for options in models if self.known(options) is None}
        ordered = sorted(todo.items(), key=lambda each: [option.layers for option in each[1]])
        work = float(len(ordered) * len(self.ground.runner.layers))
        with Progress(title, work, "layers") as progress:
            for start in range(0, len(ordered), SIDE_BY_SIDE):
                if not self.in_time():
                    return
                lot = ordered[start : start + SIDE_BY_SIDE]
                kl = self._walk([options for _, options in lot], progress)
                self.store.keep({key: each for (key, _), each in zip(lot, kl, strict=True)})

    def _walk(self, models: list[list[Option]], progress: Progress) -> Tensor:
        """KL of each model on each sequence, [models, S]."""
        ground, runner = self.ground, self.ground.runner
        shape = ground.scoring.shape
        streams = Streams(len(models), tuple(shape[1:]), ground.scoring.dtype).data
        starts = [options[0].layers[0] for options in models]
        covers = [{layer: option for option in options for layer in option.layers} for options in models]
        with torch.no_grad():
            for index in range(min(starts), len(runner.layers)):
                for model, start in enumerate(starts):
                    if start == index:
                        streams[model] = ground.scoring[index]
                running = [model for model, start in enumerate(starts) if start <= index]
                self._layer(index, [model for model in running if index not in covers[model]], streams)
                for option in dict.fromkeys(covers[m][index] for m in running if index in covers[m]):
                    # An option over several layers is done at its first.
                    if option.layers[0] == index:
                        mine = [model for model in running if covers[model].get(index) == option]
                        self._option(option, mine, streams)
                progress.advance(len(models) if index > min(starts) else len(models) * (index + 1))
        rows = [len(ground.scores)] * len(models)
        return divergences(runner, streams, rows, ground.scoring[-1])

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
