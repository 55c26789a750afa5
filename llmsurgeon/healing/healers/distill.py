"""`distill`: training towards the parent."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmsurgeon.healing.distill.case import Case
from llmsurgeon.healing.distill.distill import Distilled, distill
from llmsurgeon.healing.healers.base import HealingContext
from llmsurgeon.operations.distill import Distill
from llmsurgeon.report.curve import html_curves
from llmsurgeon.text.sequences import Sequences


@dataclass(frozen=True)
class Trained:
    """The trainings, one for each step."""

    files: Mapping[str, Path]
    trainings: tuple[Distilled, ...]

    def behind(self, earlier: Trained) -> Trained:
        """With the trainings of earlier steps."""
        return replace(self, trainings=(*earlier.trainings, *self.trainings))

    def record(self) -> list[dict[str, Any]]:
        """An entry for each training."""
        return [training.to_dict() for training in self.trainings]

    def notes(self) -> list[str]:
        """A line for each training."""
        return [training.note for training in self.trainings]

    def lines(self) -> list[str]:
        """The notes, with how each training went."""
        found = []
        for training in self.trainings:
            found.append(training.note)
            for block, made in training.trainings:
                measure = "KL" if all("kl" in judged for judged in made.judged) else "1 - cos"
                name = f"held-out {measure}" if block is None else f"block {block}, held-out loss"
                values = [judged["value"] for judged in made.judged]
                change = f"{name} {values[0]:.4f} -> {min(values):.4f}, " if values else ""
                found.append(f"  {change}{made.tokens_per_second:,.0f} tokens/s")
        return found

    def pages(self, name: str) -> Mapping[str, str]:
        """The losses step by step, and as curves."""
        lines = (json.dumps(line) + "\n" for training in self.trainings for line in training.log)
        return {"loss.jsonl": "".join(lines), "report.html": html_curves(name, self.trainings)}


def distilled(context: HealingContext, step: Distill) -> Trained:
    """The student trained; the time that a step is given begins here, with reading the text."""
    began = time.monotonic()
    case = Case(
        parent=context.parent,
        parent_config=context.parent_config,
        parent_spec=context.parent_spec,
        fingerprint=context.fingerprint,
        config=context.config,
        spec=context.spec,
        weights=context.weights,
        text=context.training(step, Sequences(context.windows, context.kinds)[~context.held_out]),
        held_out=context.windows[context.held_out],
        folder=context.folder,
        logs=context.logs,
        device=context.device,
        batch=context.batch,
        say=context.say,
    )
    made = distill(case, step, began)
    return Trained(made.files, (made,))
