"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmsurgeon.errors import SurgeryError

if TYPE_CHECKING:
    import torch


OVERWRITE = "Replace OUT if it exists and holds nothing but what llmsurgeon wrote."
DISCARD = "Delete what an unfinished run left in OUT.partial, be it of another job, and begin anew."


def short_name(model: str) -> str:
    """The last part of a hub id or path, for names of output folders."""
    return Path(model).stem if model.endswith(".gguf") else Path(model).name


def text_file(name: str | None) -> str | None:
    """What --text names; a file that is not there, or of another kind, is said before anything heavy is imported."""
    from llmsurgeon.text_file import check_text_file

    if name is not None:
        check_text_file(name)
    return name


def dtype_of(name: str | None) -> torch.dtype | None:
    """The torch dtype that --dtype names; None keeps the checkpoint's own."""
    from llmsurgeon.formats.loading import DTYPES

    if name is None:
        return None
    if name not in DTYPES:
        raise SurgeryError(f"--dtype {name}: expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def recipe_paths(recipe: str | None) -> tuple[Path, ...]:
    """The file that --recipe names, or the one of a built-in recipe, which the run reads."""
    from llmsurgeon.recipe_files import find_recipe

    return (find_recipe(recipe),) if recipe else ()
