"""What is written beside the weights: recipe.yaml, surgery.json, pages and the card, of a run and of an export."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmsurgeon import __version__
from llmsurgeon.boundary.places import everywhere, without_folders
from llmsurgeon.checkpoint.card_file import HUB_ID, Heritage
from llmsurgeon.checkpoint.push import Repository
from llmsurgeon.checkpoint.source import Checkpoint
from llmsurgeon.checkpoint.writer import Stage
from llmsurgeon.errors import RecipeError
from llmsurgeon.formats.beside import write_beside
from llmsurgeon.model.costs import Costs
from llmsurgeon.operations import Step
from llmsurgeon.operations.trim_vocab import KeepTokens, TrimVocab
from llmsurgeon.planning.healed import Healed
from llmsurgeon.planning.opened import OpenedCheckpoint, shapes_of
from llmsurgeon.planning.plan import Planned
from llmsurgeon.planning.student import Student
from llmsurgeon.recipe.recipe import Recipe, dump, loads
from llmsurgeon.report.card import Made, collapse, model_card
from llmsurgeon.report.licences import NOTICE, terms_of
from llmsurgeon.report.origin import Origin, inherited, origin_of
from llmsurgeon.report.provenance import read_records


@dataclass(frozen=True)
class RunRecords:
    """A run, to be told: `recipe` as it resolved; `text` in words; tokenizer and the like are `source`'s.

    parent: the model as it came. repository: of the hub, that the result goes to. home: where the result will lie in
    the end, from where files beside it are named; where it is written, unless it is said.
    """

    planned: Planned
    healed: Healed
    recipe: Recipe
    text: str
    source: Checkpoint
    parent: Checkpoint
    repository: Repository | None = None
    home: Path | None = None

    def write(self, stage: Stage, missed: list[str]) -> None:
        """Everything but the weights; `missed` is what the recipe's gate finds too little."""
        planned, results = self.planned, self.healed.results
        origin, heritage = origin_of(self.parent), inherited(self.source, self.parent)
        write_beside(stage, planned.written, self.source)
        _write_notice(stage, heritage)
        home = self.home or stage.out
        recipe = _passed_on(stage, self.recipe.model_copy(update={"model": origin.hub_id or self.recipe.model}), home)
        stage.write_file("recipe.yaml", recipe)
        for result in results.values():
            for name, content in result.pages(home.name).items():
                stage.write_file(name, content)
        known = (planned.parent.name, *planned.recipe.calibration.files)
        surgery = everywhere(self._surgery(missed, origin), lambda text: without_folders(text, *known))
        stage.write_file("surgery.json", json.dumps(surgery, indent=2) + "\n")
        made = Made(
            self.repository.name if self.repository else None,
            origin,
            heritage,
            planned.before,
            planned.after,
            recipe=recipe,
            evaluation=self._measured,
            text=without_folders(self.text, *known),
            dataset=hub_dataset(self.recipe),
            notes=(*planned.notes, *(note for result in results.values() for note in result.notes())),
            gate=missed,
            own_code=self.source.companions.code,
        )
        stage.write_file("README.md", model_card(planned.written, made))

    @property
    def _measured(self) -> dict[str, Any] | None:
        return self.healed.evaluation.to_dict() if self.healed.evaluation else None

    def _surgery(self, missed: list[str], origin: Origin) -> dict[str, Any]:
        """surgery.json. `refit` is there in any case, for readers of the first version."""
        planned, warning = self.planned, collapse(self._measured)
        return {
            "llmsurgeon": __version__,
            "parent": origin.name,
            "origin": asdict(origin),
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


def write_export_records(
    stage: Stage, parent: OpenedCheckpoint, student: Student, repository: Repository | None = None
) -> Costs:
    """Everything but the weights of the same model in another form, and what the source says of its own making.

    Returns the parent's costs; those of the model it was made from where this tool made it.
    """
    checkpoint, written = parent.checkpoint, student.written
    write_beside(stage, written, checkpoint)
    before = parent.costs(parent.spec, shapes_of(parent.meta()))
    origin, heritage = origin_of(checkpoint), inherited(checkpoint)
    _write_notice(stage, heritage)
    surgery: dict[str, Any] = {}
    recipe = dataset = None
    if records := read_records(checkpoint.path):
        surgery, recipe, before = everywhere(records.surgery, without_folders), records.recipe, records.before
        with suppress(RecipeError):  # of another version: it goes along as it is
            read = loads(recipe, folder=checkpoint.path)
            recipe, dataset = _passed_on(stage, read, stage.out), hub_dataset(read)
    exported = [f"Exported to {written.format} from `{origin.name}`."] if recipe else []
    made = Made(
        repository.name if repository else None,
        (records.origin if records else None) or origin,
        heritage,
        before,
        student.costs,
        recipe=recipe,
        evaluation=surgery.get("evaluation"),
        text=surgery.get("calibration"),
        dataset=dataset,
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


def _passed_on(stage: Stage, recipe: Recipe, home: Path) -> str:
    """YAML of a recipe that goes along with a model in `home`, and so do its lists of tokens that are at hand.

    Such a list says what was cut, and nobody has it who is given the model alone.
    """
    inside: dict[str, str] = {}

    def own(entry: KeepTokens) -> KeepTokens:
        path = Path(entry.file or "").expanduser()
        if entry.file is None or not path.is_file():
            return entry
        if entry.file not in inside:
            name = f"kept_tokens{f'_{len(inside) + 1}' if inside else ''}{path.suffix}"
            stage.copy_file(path, name)
            inside[entry.file] = f"./{name}"
        return entry.model_copy(update={"file": inside[entry.file]})

    def with_own(step: Step) -> Step:
        if not isinstance(step, TrimVocab):
            return step
        keep = own(step.keep) if isinstance(step.keep, KeepTokens) else tuple(map(own, step.keep))
        return step.model_copy(update={"keep": keep})

    recipe = recipe.model_copy(update={"steps": tuple(map(with_own, recipe.steps))})
    return dump(recipe, home, inside=inside.values())


def hub_dataset(recipe: Recipe) -> str | None:
    """The dataset of the hub that a recipe's calibration reads, None where it reads a folder or none."""
    name = (recipe.calibration.dataset or "").partition(":")[0]
    return name if HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _write_notice(stage: Stage, heritage: Heritage) -> None:
    """The notice that the parent's licence asks for, where the parent brings none along."""
    if (terms := terms_of(heritage)) and not (stage.path / NOTICE).exists():
        stage.write_file(NOTICE, terms.notice + "\n")
