"""All that a result depends on, by name: what tells one job from another, and what must not change meanwhile.

A killed run may go on only where every input is what it was. Results depend on the weights, the recipe and this
version; where something is computed on text also on the text itself, the tokenizer, the dtype, the kind of device and
the libraries that compute. They do not depend on the number of threads or processes beyond rounding and the size of a
training batch, which a run that goes on may change as it may change how long it lasts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llmsurgeon import __version__
from llmsurgeon.checkpoint.files import Stamp, content_sum
from llmsurgeon.checkpoint.source import Checkpoint
from llmsurgeon.planning.options import Options, device_kind
from llmsurgeon.recipe.recipe import Recipe
from llmsurgeon.text.documents import dataset_revision
from llmsurgeon.text.files import stamped_sum

# Libraries whose version decides what is computed, beside those of single operations.
LIBRARIES = ("torch", "transformers", "tokenizers", "numpy")
# What this tool wrote beside a checkpoint's weights, which heal and export read.
RECORDS = ("surgery.json", "recipe.yaml")
# Keys of a recipe that change nothing in the weights: the model has parts of its own.
TOLD = ("version", "description", "model", "gate")


@dataclass
class Inputs:
    """Parts of a job (name -> short text or hash), and the stamps of the files that were read for them."""

    parts: dict[str, str]
    stamps: list[Stamp] = field(default_factory=list)

    @classmethod
    def of(
        cls, verb: str, models: Mapping[str, Checkpoint], recipe: Recipe | None, options: Options, **more: Any
    ) -> Inputs:
        """What a verb reads: `models` by their part in it ("parent"), the texts and datasets of a recipe.

        The recipe itself counts once its steps are resolved: see `job`. `more` are arguments of the verb.

        Raises:
            SurgeryError: a text cannot be read.
        """
        found = cls({"llmsurgeon": __version__, "verb": verb})
        found.parts |= {name.replace("_", " "): str(value) for name, value in more.items()}
        for role, checkpoint in models.items():
            found.parts[role] = checkpoint.fingerprint
            found.stamps += checkpoint.stamps
            found.watch(f"{role}'s records", (checkpoint.path / name for name in RECORDS))
        if recipe is not None and computes(recipe):
            found._computed(models, recipe, options)
        return found

    def job(self, recipe: Recipe | None = None) -> dict[str, str]:
        """The parts of the job, those of the resolved `recipe` among them: "distill.seed" -> "0"."""
        parts = dict(self.parts)
        for name, value in leaves(recipe) if recipe else ():
            # A text counts by what is in it, a dataset by its revision.
            parts.setdefault(name, value if isinstance(value, str) else json.dumps(value))
        return parts

    def check(self) -> None:
        """Raise CheckpointError where a file is not what it was when it was read, and say which."""
        for stamp in self.stamps:
            stamp.check()

    def watch_text(self, name: str, path: str) -> None:
        """One part for the content of a text file, which must stay as it is.

        Raises:
            SurgeryError: it cannot be read.
        """
        self.parts[name], stamp = stamped_sum(Path(path))
        self.stamps.append(stamp)

    def watch(self, name: str, paths: Iterable[Path]) -> None:
        """One part for the content of some files, those that are there, which must stay as they are."""
        digest = sha256()
        for path in (path for path in paths if path.is_file()):
            found, stamp = content_sum(path)
            digest.update(f"{path.name} {found}\n".encode())
            self.stamps.append(stamp)
            self.parts[name] = digest.hexdigest()

    def _computed(self, models: Mapping[str, Checkpoint], recipe: Recipe, options: Options) -> None:
        datasets = False
        for role, checkpoint in models.items():
            self.watch(f"{role}'s tokenizer", checkpoint.own_tokenizer_files())
        self.parts |= {"dtype": str(options.dtype), "device": device_kind(options.device)}
        if precision := os.environ.get("ACCELERATE_MIXED_PRECISION"):
            self.parts["mixed precision"] = precision
        for name, value in leaves(recipe):
            key = name.rpartition(".")[2]
            if key == "text":
                self.watch_text(name, value)
            elif key == "file":
                self.watch(name, [Path(value)])
            elif key == "dataset":
                self.parts[name], datasets = f"{value} at {dataset_revision(value)}", True
        own = [library for step in recipe.steps for library in step.libraries]
        for library in (*LIBRARIES, *(["datasets"] if datasets else []), *own):
            try:
                self.parts[library] = version(library)
            except PackageNotFoundError:
                continue


def computes(recipe: Recipe) -> bool:
    """True where something of the recipe's result is computed on text."""
    return bool(recipe.calibration.sources or recipe.gate or any(step.computes() for step in recipe.steps))


def leaves(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """What a recipe says that weights depend on, by name: ("calibration.tokens", 4096), ("distill.data[0].text", ...).

    Steps go by their op, and by their number where several have one. What a run that goes on may change is left out.
    """
    whole = recipe.model_copy(update={"steps": tuple(step.job() for step in recipe.steps)})
    data = whole.model_dump(mode="json", exclude_none=True)
    steps = data.pop("steps")
    ops = [step["op"] for step in steps]
    yield "steps", ", ".join(ops)
    for place, step in enumerate(steps):
        name = f"{ops[place]}[{place}]" if ops.count(ops[place]) > 1 else ops[place]
        yield from _flat({key: value for key, value in step.items() if key != "op"}, name)
    yield from _flat({key: value for key, value in data.items() if key not in TOLD}, "")


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for place, inner in enumerate(value):
            yield from _flat(inner, f"{name}[{place}]")
    else:
        yield name, value
