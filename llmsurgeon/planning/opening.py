"""The checkpoint that a recipe operates on, and the files that the recipe names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmsurgeon.checkpoint.out_place import existing
from llmsurgeon.operations import Step
from llmsurgeon.planning.checks import check_recipe
from llmsurgeon.planning.opened import DescribedModel, OpenedCheckpoint, open_known, open_model
from llmsurgeon.planning.options import Options
from llmsurgeon.planning.trimming import trimmed_by
from llmsurgeon.recipe.recipe import Recipe

# Operations that are done when the checkpoint is opened: op -> (checkpoint, step, options) -> the one that all others
# see. Without options it is for a dry run: nothing is computed, and sizes are what they will be.
OPENERS: dict[str, Callable[[OpenedCheckpoint, Any, Options | None], OpenedCheckpoint]] = {"trim_vocab": trimmed_by}


def opened(
    model: str,
    recipe: Recipe,
    revision: str | None = None,
    trust_remote_code: bool = False,
    options: Options | None = None,
) -> OpenedCheckpoint:
    """The checkpoint that a recipe operates on: where its first step trims the vocabulary, with the rows that stay.

    Raises:
        SurgeryError: as `open_model`, or that step cannot be done as asked for.
    """
    parent = open_model(model, revision, trust_remote_code)
    step = _opening(recipe)
    if step is None:
        return parent
    check_recipe(parent, recipe)
    return OPENERS[step.op](parent, step, options)


def described(
    model: str, recipe: Recipe, revision: str | None = None, trust_remote_code: bool = False
) -> DescribedModel:
    """What a recipe would operate on, for a dry run: the config is enough, unless opening is part of the recipe.

    Raises:
        SurgeryError: as `opened`.
    """
    # Which tokens stay is read from the tokenizer's files.
    if _opening(recipe):
        return opened(model, recipe, revision, trust_remote_code)
    return open_known(model, revision, trust_remote_code)


def _opening(recipe: Recipe) -> Step | None:
    return next((step for step in recipe.steps if step.op in OPENERS), None)


def files_of(recipe: Recipe) -> tuple[Path, ...]:
    """The files and folders that a recipe names and a run of it reads."""
    named = (name for step in recipe.steps for name in step.reads())
    return existing(*recipe.calibration.files, *named)
