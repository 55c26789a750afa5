"""What a training is: what it is asked, where it is, and what it made. One folder holds all of it.

`state-N` (accelerate's checkpoint at step N, with `loop.json`), `best-N.safetensors`, `loss.jsonl`, and at the end
`result.json`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from llmsurgeon.checkpoint.kept import forget, kept
from llmsurgeon.healing.distill.data import Corpus

if TYPE_CHECKING:
    from llmsurgeon.operations.distill import Distill

LOG, RESULT = "loss.jsonl", "result.json"
ROOM = "the checkpoint before it is whole: free some space and start the same command again"

# The loss has diverged where its median over so many steps is this many times the lowest such median.
WINDOW, DIVERGED = 20, 3.0

# Steps, tokens and minutes; whichever ends first.
Limits = tuple[int | None, int | None, float | None]


class Task(Protocol):
    """What is trained on, and by what it is judged."""

    corpus: Corpus
    ahead: int

    def prepare(self, numbers: np.ndarray) -> None:
        """Make ready what `batch` will want for these rows; called by the main process alone."""

    def batch(self, numbers: np.ndarray, step: int, device: torch.device) -> dict[str, Tensor]:
        """The module's arguments for these rows."""

    def judge(self, module: nn.Module) -> dict[str, float]:
        """Measures on held-out text; the lower `value`, the better."""


@dataclass(frozen=True)
class Run:
    """Where a training is kept, and how long it lasts.

    folder: of this job alone; what is found there is gone on from.
    prefix: what the module's names have in front of the student's.
    began: when the time budget began (`time.monotonic()`); now, if it is not given.
    """

    folder: Path
    limits: Limits
    prefix: str = ""
    title: str = "distill"
    began: float | None = None

    def how_far(self, state: State) -> str:
        """For people who find the training unfinished."""
        steps, tokens, minutes = self.limits
        of = [f" of {limit:,}" if limit else "" for limit in (steps, tokens)] + [f" of {minutes:g}" if minutes else ""]
        spent = f"{state.seconds / 60:.1f}{of[2]} minutes"
        return f"{self.title}: step {state.step:,}{of[0]}, {state.tokens:,}{of[1]} tokens, {spent}"


@dataclass
class State:
    """Where a run is: with the weights and the optimizer, all that going on depends on."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    drawn: list[int] = field(default_factory=list)
    prepared: int = 0
    judged: list[dict[str, float]] = field(default_factory=list)
    best_step: int | None = None
    recent: list[float] = field(default_factory=list)
    lowest: float = math.inf
    phases: dict[str, float] = field(default_factory=dict)

    def reached(self, limits: Limits) -> float:
        """How much of the run is done, 0 to 1, by the limit that is nearest."""
        steps, tokens, minutes = limits
        shares = [self.step / steps if steps else 0, self.tokens / tokens if tokens else 0]
        return max(*shares, self.seconds / 60 / minutes if minutes else 0)

    def diverges(self, loss: float, coarser: bool) -> bool:
        """True where the median of the last losses is far above the lowest; not while what is computed gets coarser."""
        if coarser:
            self.recent, self.lowest = [loss], math.inf
            return False
        self.recent = [*self.recent, loss][-WINDOW:]
        if len(self.recent) < WINDOW:
            return False
        middle = median(self.recent)
        self.lowest = min(self.lowest, middle)
        return middle > DIVERGED * self.lowest

    def saving_is_due(self, settings: Distill, saved_at: float) -> bool:
        """True where so many steps, or minutes since `saved_at`, have passed as the settings say."""
        if self.recent[-1] > DIVERGED * self.lowest:
            return False  # the checkpoint before is a better one to fall back on
        by_steps = settings.save_steps is not None and self.step % settings.save_steps == 0
        by_time = settings.save_minutes is not None and self.seconds - saved_at >= 60 * settings.save_minutes
        return by_steps or by_time

    def patience_is_out(self, patience: int | None) -> bool:
        """True where so many evaluations in a row were no better than the best before them."""
        values = [judged["value"] for judged in self.judged]
        return patience is not None and len(values) - 1 - values.index(min(values)) >= patience


@dataclass(frozen=True)
class Training:
    """What a run of the loop did.

    file: the trained tensors under the student's names, None where the student was best as it came.
    stopped: why it ended.
    judged: the measures on held-out text, the first before training.
    best_step: the step whose weights were kept.
    phases: seconds by what they were spent on.
    """

    file: str | None
    folder: str
    steps: int
    tokens: int
    seconds: float
    stopped: str
    judged: list[dict[str, float]]
    best_step: int | None
    phases: dict[str, float]

    @property
    def tokens_per_second(self) -> float:
        """Of the whole run, everything included."""
        return self.tokens / max(self.seconds, 1e-9)


def trained(result: Path) -> Training | None:
    """What an earlier run's training made, where its result and its weights are there and whole."""
    if not kept(result):
        return None
    training = Training(**json.loads(result.read_text()))
    best = result.parent / f"best-{training.best_step}.safetensors"
    if not training.best_step or kept(best):
        return training
    forget(result)
    return None
