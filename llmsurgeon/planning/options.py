"""Where and how to run: what every verb that writes is told beside the recipe."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from llmsurgeon.checkpoint.checksums import checksum_of
from llmsurgeon.checkpoint.push import Target
from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats.devices import AUTO, chosen_device
from llmsurgeon.planning.plan import Planned
from llmsurgeon.recipe.files import find_recipe
from llmsurgeon.recipe.recipe import Recipe, load

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """Where and how to run; nothing here changes what is computed but dtype and device.

    device: "auto" (a card where there is one, else the CPU), "cpu", "cuda" ...
    overwrite: replace an OUT that this tool wrote.
    discard_partial: delete what an unfinished run left in OUT.partial.
    home: where OUT will be moved to by whoever runs this: files beside that place are named as they lie from there.
    reads: files that were read already, as the recipe, and must survive.
    checksum: the kind of the written files' checksums: blake3, sha256 or none.
    planned: is told the plan before anything is healed or written.
    push: the repository of the hub that the result goes to, too.
    trust_remote_code: let code that a checkpoint's tokenizer brings along run, and go along.

    Raises:
        SurgeryError: there is no such kind of checksum.
    """

    device: str = "auto"
    dtype: torch.dtype | None = None
    overwrite: bool = False
    max_shard_size: str = "5GB"
    batch: int = 8
    trust_remote_code: bool = False
    say: Say = field(default=lambda line: None)
    planned: Callable[[Planned], None] = field(default=lambda planned: None)
    discard_partial: bool = False
    reads: tuple[Path, ...] = ()
    checksum: str = "blake3"
    push: Target | None = None
    home: Path | None = None

    def __post_init__(self) -> None:
        checksum_of(self.checksum)

    def staging(self, *sources: Path) -> dict[str, Any]:
        """What Stage is to be told of OUT, where `sources` are read beside `reads`."""
        reads = (*sources, *self.reads)
        return {"overwrite": self.overwrite, "discard_partial": self.discard_partial, "sources": reads}


def device_kind(device: str) -> str:
    """cpu, cuda ...: what is computed is the same to the last bit on one of a kind only."""
    return torch.device(chosen_device(device) if device == AUTO else device).type


def as_given(recipe: Recipe | str | os.PathLike[str], options: Options | None = None) -> tuple[Recipe, Options]:
    """A recipe, and options: with the device that "auto" stands for, and the recipe's file among what must survive.

    Raises:
        RecipeError: there is no such recipe, or with every problem found in it.
        SurgeryError: the device cannot be used here.
    """
    options = options or Options()
    options = replace(options, device=chosen_device(options.device))
    if isinstance(recipe, Recipe):
        return recipe, options
    name = os.fspath(recipe)
    return load(name), replace(options, reads=(*options.reads, find_recipe(name)))


def model_of(model: str | os.PathLike[str] | None, recipe: Recipe) -> str:
    """The model that is named, else the recipe's.

    Raises:
        SurgeryError: neither names one.
    """
    name = recipe.model if model is None else os.fspath(model)
    if not name:
        raise SurgeryError("no model: name one on the command line or in the recipe (model: ...)")
    return name
