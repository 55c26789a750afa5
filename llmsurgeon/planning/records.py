"""What is written beside the weights: recipe.yaml, surgery.json, pages and the card, of a run and of an export."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmsurgeon import __version__
from llmsurgeon.boundary.places import everywhere, without_folders
from llmsurgeon.checkpoint.source import Checkpoint
from llmsurgeon.checkpoint.writer import Stage
from llmsurgeon.errors import RecipeError
from llmsurgeon.formats.beside import write_beside
from llmsurgeon.model.costs import Costs
from llmsurgeon.planning.healed import Healed
from llmsurgeon.planning.opened import OpenedCheckpoint, shapes_of
from llmsurgeon.planning.plan import Planned
from llmsurgeon.planning.student import Student
from llmsurgeon.recipe.recipe import dump, loads
from llmsurgeon.report.card import Made, collapse, model_card
from llmsurgeon.report.provenance import read_records


@dataclass(frozen=True)
class RunRecords:
    """A run, to be told: `recipe` as it resolved, in YAML; `text` in words; tokenizer and the like are `source`'s."""

    planned: Planned
    healed: Healed
    recipe: str
    text: str
    source: Checkpoint

    def write(self, stage: Stage, missed: list[str]) -> None:
        """Everything but the weights; `missed` is what the recipe's gate finds too little."""
        planned, results = self.planned, self.healed.results
        write_beside(stage, planned.written, self.source)
        stage.write_file("recipe.yaml", self.recipe)
        for result in results.values():
            for name, content in result.pages(Path(stage.out).name).items():
                stage.write_file(name, content)
        known = (planned.parent.name, *planned.recipe.calibration.files)
        surgery = everywhere(self._surgery(missed), lambda text: without_folders(text, *known))
        stage.write_file("surgery.json", json.dumps(surgery, indent=2) + "\n")
        made = Made(
            planned.parent.name,
            planned.before,
            planned.after,
            recipe=self.recipe,
            evaluation=self._measured,
            text=without_folders(self.text, *known),
            notes=(*planned.notes, *(note for result in results.values() for note in result.notes())),
            gate=missed,
            own_code=self.source.companions.code,
        )
        stage.write_file("README.md", model_card(planned.written, made))

    @property
    def _measured(self) -> dict[str, Any] | None:
        return self.healed.evaluation.to_dict() if self.healed.evaluation else None

    def _surgery(self, missed: list[str]) -> dict[str, Any]:
        """surgery.json. `refit` is there in any case, for readers of the first version."""
        planned, warning = self.planned, collapse(self._measured)
        return {
            "llmsurgeon": __version__,
            "parent": planned.parent.name,
            "format": planned.written.format,
            "before": planned.before.to_dict(),
            "after": planned.after.to_dict(),
            "evaluation": self._measured,
            "calibration": self.text,
            "gate_missed": missed,
            **({"warning": warning} if warning else {}),
            "refit": [],
            "parents": [list(layer.parents) for layer in planned.spec.layers],
            **{op: record for op, result in self.healed.results.items() if (record := result.record())},
        }


def write_export_records(stage: Stage, parent: OpenedCheckpoint, student: Student) -> Costs:
    """Everything but the weights of the same model in another form, and what the source says of its own making.

    Returns the parent's costs; those of the model it was made from where this tool made it.
    """
    checkpoint, written = parent.checkpoint, student.written
    write_beside(stage, written, checkpoint)
    before = parent.costs(parent.spec, shapes_of(parent.meta()))
    surgery: dict[str, Any] = {}
    recipe = None
    if records := read_records(checkpoint.path):
        surgery, recipe, before = everywhere(records.surgery, without_folders), records.recipe, records.before
        with suppress(RecipeError):  # of another version: it goes along as it is
            recipe = dump(loads(recipe, folder=checkpoint.path), stage.out)
    exported = [f"Exported to {written.format} from `{Path(parent.name).name}`."] if recipe else []
    made = Made(
        surgery.get("parent", parent.name),
        before,
        student.costs,
        recipe=recipe,
        evaluation=surgery.get("evaluation"),
        text=surgery.get("calibration"),
        notes=(*exported, *parent.notes),
        gate=surgery.get("gate_missed", []),
        own_code=checkpoint.companions.code,
    )
    stage.write_file("README.md", model_card(written, made))
    if recipe:
        stage.write_file("recipe.yaml", recipe)
        surgery = {**surgery, "format": written.format, "after": student.costs.to_dict()}
        stage.write_file("surgery.json", json.dumps(surgery, indent=2) + "\n")
    return before
