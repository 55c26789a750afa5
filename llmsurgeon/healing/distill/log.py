"""What a training writes while it goes: `loss.jsonl`, and the trackers that a recipe names."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsurgeon.checkpoint.kept import writing
from llmsurgeon.healing.distill.training import LOG, ROOM, State

if TYPE_CHECKING:
    from accelerate import Accelerator

    from llmsurgeon.operations.distill import Distill


class Log:
    """One line a step, with every loss by its name in LOSSES, and one for each evaluation."""

    def __init__(self, folder: Path, settings: Distill, accelerator: Accelerator) -> None:
        self.file, self.settings, self.accelerator = folder / LOG, settings, accelerator

    def begin(self) -> None:
        """Tell trackers of the run."""
        if self.settings.trackers:
            self.accelerator.init_trackers("llmsurgeon", config=_flat(self.settings))

    def end(self) -> None:
        """Tell trackers that it is over."""
        if self.settings.trackers:
            self.accelerator.end_training()

    def step(self, state: State, values: dict[str, float]) -> None:
        """A step's losses, learning rate and gradient norm."""
        line = {"step": state.step, "tokens": state.tokens, "seconds": round(state.seconds, 2), **values}
        self._write(line)
        if self.settings.trackers:
            self.accelerator.log(line, step=state.step)

    def evaluation(self, state: State, measures: dict[str, float]) -> None:
        """What was measured on held-out text."""
        self._write({"evaluation": measures})
        if self.settings.trackers:
            self.accelerator.log({f"evaluation/{k}": v for k, v in measures.items()}, step=state.step)

    def trim(self, state: State) -> None:
        """Drop what an interrupted run logged after the checkpoint that this one starts from."""
        if not self.accelerator.is_main_process or not self.file.exists():
            return
        kept = []
        for line in self.file.read_text(errors="replace").splitlines():
            with suppress(ValueError, KeyError, TypeError, AttributeError):  # cut short by a kill, or damaged
                entry = json.loads(line)
                measured = entry.get("evaluation", entry)
                if measured["step"] <= state.step and ("evaluation" not in entry or measured in state.judged):
                    kept.append(line + "\n")
        new = self.file.with_suffix(".new")
        with writing(self.file, then=ROOM):
            new.write_text("".join(kept))
            new.replace(self.file)

    def _write(self, line: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with writing(self.file, then=ROOM), self.file.open("a") as log:
                log.write(json.dumps(line) + "\n")


def _flat(settings: Distill) -> dict[str, Any]:
    """The settings as trackers take them."""
    plain = settings.model_dump(mode="json", exclude_none=True)
    return {key: value if isinstance(value, int | float | str) else json.dumps(value) for key, value in plain.items()}
