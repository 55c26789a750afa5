"""Healing by gradients: the whole student towards its parent, or each changed layer on its own."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from llmsurgeon.errors import SurgeryError
from llmsurgeon.healing.distill.case import Case
from llmsurgeon.healing.distill.local import distill_locally
from llmsurgeon.healing.distill.losses import LOSSES
from llmsurgeon.healing.distill.training import LOG, Training
from llmsurgeon.healing.distill.whole import distill_globally

if TYPE_CHECKING:
    from llmsurgeon.operations.distill import Distill


@dataclass(frozen=True)
class Distilled:
    """What a distillation made.

    files: name of each trained tensor -> the file that holds it.
    trainings: (layer, training), one for each layer in local mode; (None, training) for the whole student.
    log: the losses step by step, and what was measured on held-out text.
    """

    mode: str
    files: dict[str, Path]
    trainings: tuple[tuple[int | None, Training], ...]
    log: list[dict[str, Any]]
    seconds: float

    @property
    def tokens(self) -> int:
        """Tokens trained on; in local mode the mean over layers."""
        return sum(training.tokens for _, training in self.trainings) // len(self.trainings)

    @property
    def labels(self) -> dict[str, str]:
        """The losses of the log that have a curve, and how they are called."""
        return {"loss": "Loss"} | {name: loss.label for name, loss in LOSSES.items() if loss.label}

    @property
    def note(self) -> str:
        """One line for the model card."""
        what = "the whole student" if self.mode == "global" else f"{len(self.trainings)} blocks, each on its own"
        line = f"Distilled: {what}, {self.tokens:,} tokens in {_duration(self.seconds)}"
        kept = [training for _, training in self.trainings if training.file is None]
        odd = [t.stopped for _, t in self.trainings if t.stopped != "done"]
        line += f"; {len(kept)} of {len(self.trainings)} kept as it was, nothing was better" if kept else ""
        return line + (f" ({'; '.join(odd)})." if odd else ".")

    def to_dict(self) -> dict[str, Any]:
        """For surgery.json."""
        return {
            "mode": self.mode,
            "seconds": round(self.seconds, 1),
            "trainings": [{"block": layer, **_report(training)} for layer, training in self.trainings],
        }


def _report(training: Training) -> dict[str, Any]:
    kept = {name: value for name, value in asdict(training).items() if name not in ("file", "folder")}
    return {**kept, "tokens_per_second": round(training.tokens_per_second, 1)}


def distill(case: Case, settings: Distill, began: float | None = None) -> Distilled:
    """Heal the student with gradients, globally or layer by layer as the settings say.

    `began`: when the time budget began (`time.monotonic()`); now, if it is not given.

    Raises:
        SurgeryError: bad settings, no text, or a loss that diverges.
        Stopped: on SIGTERM, with everything saved in the case's folder.
    """
    began = time.monotonic() if began is None else began
    trainings: list[tuple[int | None, Training]]
    if settings.mode == "global":
        trainings = [(None, distill_globally(case, settings, began))]
    else:
        trainings = [*distill_locally(case, settings, began)]
    if settings.minutes is not None and not any(training.steps for _, training in trainings):
        raise SurgeryError(
            f"distill: not one step fitted into {settings.minutes:g} minutes, which began with reading the text and "
            "asking the parent; give more of them. What the parent said is kept for the next run"
        )
    files: dict[str, Path] = {}
    log = []
    for layer, training in trainings:
        prefix = "" if layer is None else case.parent.family.layer(layer)
        if training.file:
            with safe_open(training.file, framework="pt") as opened:
                files |= {prefix + name: Path(training.file) for name in opened.keys()}  # noqa: SIM118
        curve = Path(training.folder) / LOG
        lines = curve.read_text().splitlines() if curve.is_file() else []
        log += [{**({} if layer is None else {"block": layer}), **json.loads(line)} for line in lines]
    return Distilled(settings.mode, files, tuple(trainings), log, time.monotonic() - began)


def _duration(seconds: float) -> str:
    """In minutes, from two of them on."""
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"
