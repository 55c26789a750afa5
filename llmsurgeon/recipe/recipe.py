"""Recipes: what a YAML file may say, as typed and frozen models, and how it is read, checked and written.

Unknown keys are errors. Every problem of a file is reported at once, with its line and the nearest known word.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from llmsurgeon.boundary.limits import LARGEST_SEED, LONGEST_SEQUENCE, MOST_TOKENS
from llmsurgeon.boundary.places import found, published, relative
from llmsurgeon.errors import RecipeError
from llmsurgeon.formats.names import WantedForm
from llmsurgeon.operations import OPERATIONS
from llmsurgeon.recipe.files import (
    Document,
    Dumper,
    KeyPath,
    builtin_recipes,
    did_you_mean,
    find_recipe,
    override,
    parse_document,
    read_document,
    recipes_dir,
)
from llmsurgeon.text.files import TextFile
from llmsurgeon.text.kinds import ALL, OfItself

if TYPE_CHECKING:
    from llmsurgeon.operations.base import Step as AnyStep
else:
    AnyStep = Annotated[Union[tuple(OPERATIONS.values())], Field(discriminator="op")]  # noqa: UP007 - built at run time

__all__ = ["Calibration", "Gate", "Recipe", "builtin_recipes", "calibration", "dump", "load", "loads", "recipes_dir"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# The share of calibration text that is sampled from the model beside what a user names, where nobody says another.
SELF_SHARE = 0.25


class TextSource(_Part):
    """One of several sources of calibration text: a file, a hub dataset, or a kind of text that the model writes."""

    text: TextFile | None = Field(default=None, description="a .txt (UTF-8), .jsonl or .parquet file")
    dataset: str | None = Field(default=None, description="name of a dataset on the Hugging Face hub")
    self: OfItself | None = Field(default=None, description="a kind of text sampled from the model, or all of them")
    weight: float = Field(default=1.0, gt=0, description="how much of it there is beside the other sources")

    @property
    def words(self) -> str:
        """What it is, for a reader."""
        return self.text or (f"dataset {self.dataset}" if self.dataset else f"what the model writes ({self.self})")

    @model_validator(mode="after")
    def _one(self) -> TextSource:
        given = [name for name in ("text", "dataset", "self") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"takes exactly one of text, dataset and self, got {', '.join(given) or 'none'}")
        return self


class Calibration(_Part):
    """The text that scores and refits are computed on.

    `text` or `dataset`, beside which a share of it is sampled from the model, or `texts`, several sources; with none of
    them all of it is sampled.
    """

    text: TextFile | None = Field(
        default=None, description="a .txt (UTF-8), .jsonl or .parquet file; relative to the working folder"
    )
    dataset: str | None = Field(default=None, description="name of a dataset on the Hugging Face hub")
    texts: tuple[TextSource, ...] | None = Field(
        default=None, min_length=1, description="several sources in place of text or dataset, by their weights"
    )
    self_share: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="share that is sampled from the model beside text or dataset; left out: 0.25, of encoders 0",
    )
    tokens: int = Field(default=65_536, ge=1, le=MOST_TOKENS, description="how many tokens to use at most")
    sequence_length: int = Field(
        default=512,
        ge=2,
        le=LONGEST_SEQUENCE,
        description="tokens in a window; left out: 512, or as many as model and tokens hold",
    )
    sentences: bool = Field(
        default=False,
        description="of text or dataset: a window is one sentence, as sentence encoders read; for fff, refit, distill",
    )
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED, description="seed of sampling and shuffling")

    @property
    def sources(self) -> tuple[TextSource, ...]:
        """The sources that are named; () where all text is sampled from the model."""
        if self.texts is not None:
            return self.texts
        return (TextSource(text=self.text, dataset=self.dataset),) if self.text or self.dataset else ()

    @property
    def files(self) -> tuple[str, ...]:
        """The files and datasets that are named."""
        return tuple(name for source in self.sources if (name := source.text or source.dataset))

    def shares(self, encoder: bool) -> dict[str, float]:
        """What each source is, in words, and its share of the text; they add up to 1."""
        sources = self._all_sources(encoder)
        total = sum(source.weight for source in sources)
        return {source.words: source.weight / total for source in sources}

    def written_share(self, encoder: bool) -> float:
        """The share of the text that the model writes itself."""
        sources = self._all_sources(encoder)
        return sum(source.weight for source in sources if source.self) / sum(source.weight for source in sources)

    def _all_sources(self, encoder: bool) -> tuple[TextSource, ...]:
        share = self.sampled_share(encoder)
        own = TextSource(self=ALL, weight=share or 1.0)
        if self.texts is not None:
            return self.texts
        if not self.sources:
            return (own,)
        named = self.sources[0].model_copy(update={"weight": 1 - share})
        return (named, own) if share else (named,)

    def sampled_share(self, encoder: bool) -> float:
        """What is sampled from the model beside text or dataset; nothing where it cannot write such text."""
        if self.self_share is not None:
            return self.self_share
        return SELF_SHARE if (self.text or self.dataset) and not encoder and not self.sentences else 0.0

    @model_validator(mode="after")
    def _consistent(self) -> Calibration:
        if self.text is not None and self.dataset is not None:
            raise ValueError("takes text or dataset, not both")
        if self.texts is not None and (self.text or self.dataset):
            raise ValueError("takes texts alone, without text or dataset beside them: name them among texts")
        if self.self_share is not None and self.texts is not None:
            raise ValueError("self_share is of what is beside text or dataset; of texts the weights say it")
        if self.sentences and any(source.self for source in self.sources):
            raise ValueError("sentences are of text or dataset: the model writes none")
        if self.tokens < self.sequence_length and "sequence_length" in self.model_fields_set:
            raise ValueError(
                f"tokens ({self.tokens}) must cover one sequence_length ({self.sequence_length}); "
                "raise calibration.tokens (--tokens), or lower calibration.sequence_length (--seq-len)"
            )
        return self


class Gate(_Part):
    """What the result must reach. A miss ends with exit code 3; the output is kept and its card says so."""

    max_perplexity_ratio: float | None = Field(default=None, gt=0, description="perplexity / the parent's perplexity")
    max_bits_per_byte_ratio: float | None = Field(
        default=None, gt=0, description="bits per byte / the parent's; also where a vocabulary was trimmed"
    )
    kinds: dict[str, Annotated[float, Field(gt=0)]] | None = Field(
        default=None, min_length=1, description="perplexity ratio of single kinds of text, `all` for each of them"
    )
    max_kl: float | None = Field(default=None, ge=0, description="KL(parent || result) in nats a token")
    min_top1_agreement: float | None = Field(
        default=None, ge=0, le=1, description="share of tokens whose top token stays"
    )
    min_hidden_cosine: float | None = Field(
        default=None, ge=-1, le=1, description="encoders: cosine of the last hidden states to the parent's"
    )
    min_pooled_cosine: float | None = Field(
        default=None, ge=-1, le=1, description="encoders: cosine of the mean-pooled states to the parent's"
    )


class Recipe(_Part):
    """A recipe: the model, the steps in order, and what the result must reach."""

    version: Literal[1] = Field(description="version of the recipe format")
    description: str | None = Field(default=None, description="one line for lists and model cards")
    model: str | None = Field(default=None, description="hub id, folder or GGUF file; may be given on the command line")
    calibration: Calibration = Field(default_factory=lambda: Calibration(), description="calibration text")
    steps: tuple[AnyStep, ...] = Field(min_length=1, description="operations in order")
    gate: Gate | None = Field(default=None, description="what the result must reach")
    format: WantedForm = Field(default="auto", description="form of the written checkpoint")


def load(name: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe in a file, or the built-in recipe of that name. `overrides` are `step.key=value` texts (`--set`).

    Raises:
        RecipeError: with every problem found.
    """
    file = find_recipe(name)
    document = read_document(file)
    # Of a recipe that was written into a folder, `./x` and `../x` mean what lies there from it.
    _each_path(document.data, lambda name: found(name, file.parent))
    return _build(document, overrides)


def calibration(**given: Any) -> Calibration:
    """The calibration of these values, by the keys that a recipe has for it.

    Raises:
        RecipeError: with every problem found.
    """
    try:
        return Calibration(**given)
    except ValidationError as error:
        found = error.errors(include_url=False)
        data = {"calibration": given}
        paths: list[KeyPath] = [("calibration", *detail["loc"]) for detail in found]
        problems = [
            f"{'.'.join(map(str, path))}: {_message(detail, path, data)}"
            for path, detail in zip(paths, found, strict=True)
        ]
        raise RecipeError(problems, "options") from None


def loads(text: str, name: str = "recipe", overrides: Iterable[str] = (), folder: Path | None = None) -> Recipe:
    """The recipe in a YAML text; `name` stands for the file, in `folder`, in messages. Errors as in `load`."""
    document = parse_document(text, name)
    if folder is not None:
        # Of a recipe that was written into a folder, `./x` and `../x` mean what lies there from it.
        _each_path(document.data, lambda name: found(name, folder))
    return _build(document, overrides)


def dump(recipe: Recipe, folder: Path | None = None, inside: Collection[str] = (), passed_on: bool = True) -> str:
    """YAML of a recipe with every default written out. `loads(dump(recipe)) == recipe`.

    To be written into `folder`, it names files and folders of this disk as `published` does, but for those that will
    lie `inside` it, `./x`. What is not `passed_on` names all of them as they lie from there, so that it runs.
    """
    data = recipe.model_dump(mode="json", exclude_none=True)
    if folder is not None:
        here = Path(os.path.abspath(folder.expanduser()))
        placed = published if passed_on else relative
        _each_path(data, lambda name: name if name in inside else placed(name, here))
    return yaml.dump(data, Dumper=Dumper, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)


PATHS = ("model", "text", "dataset", "file")


def _each_path(data: Any, change: Callable[[str], str]) -> None:
    """Change, in place, what stands under keys that name files."""
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        if isinstance(value, str) and key in PATHS:
            data[key] = change(value)
        else:
            _each_path(value, change)


def _build(document: Document, overrides: Iterable[str]) -> Recipe:
    if not isinstance(document.data, dict):
        found = "the file is empty" if document.data is None else f"found {_kind(document.data)}"
        raise RecipeError([f"{document.name}: expected a mapping of keys (version, model, steps, ...), {found}"])
    for text in overrides:
        override(document, text, Recipe.model_fields)
    try:
        # JSON's strict mode takes lists for tuples and still refuses "8" and true for a number.
        recipe = Recipe.model_validate_json(json.dumps(document.data), strict=True)
    except ValidationError as error:
        _report(error, document)
    if document.problems:
        raise RecipeError(sorted(document.problems, key=_line))
    return recipe


def _line(problem: str) -> int:
    match = re.search(r":(\d+): ", problem)
    return int(match[1]) if match and not problem.startswith("--set") else 1_000_000


def _report(error: ValidationError, document: Document) -> None:
    """Add pydantic's errors to the document's problems, one for each key."""
    groups: dict[KeyPath, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        groups.setdefault(_path(detail, document.data), []).append(detail)
    for path, details in groups.items():
        if path in document.reported:
            continue
        given = _at(document.data, path)
        if path in (("steps",), ("calibration", "texts")) and given and isinstance(given, list):
            continue  # pydantic counts only the entries that passed; the others have problems of their own
        # Where a field takes a word or a list, say only what is wrong with the kind that was written.
        word = [d for d in details if d["type"] == "literal_error"]
        other = [d for d in details if d["type"] != "literal_error"]
        details = (word or other) if isinstance(given, str) else (other or word)
        document.report(path, " or ".join(dict.fromkeys(_message(d, path, document.data) for d in details)))


def _path(detail: ErrorDetails, data: Any) -> KeyPath:
    """The error's key path in the file. Pydantic also names union members on the way, which no file has."""
    path: KeyPath = ()
    for part in detail["loc"]:
        node = _at(data, path)
        if (isinstance(node, dict) and part in node) or (isinstance(node, list) and part in range(len(node))):
            path = (*path, part)
        elif not (path[:1] == ("steps",) and len(path) == 2 and part == node.get("op")):
            break
    return path


def _at(data: Any, path: KeyPath) -> Any:
    for part in path:
        data = data[part]
    return data


def _message(detail: ErrorDetails, path: KeyPath, data: Any) -> str:
    given, context = detail["input"], detail.get("ctx", {})
    match detail["type"]:
        case "extra_forbidden":
            known = _keys(path[:-1], data)
            return f"unknown key{did_you_mean(str(path[-1]), known)} (known: {', '.join(known)})"
        case "too_short":
            return "expected at least one entry"
        case "missing":
            return f"the key {detail['loc'][-1]!r} is missing"
        case "union_tag_not_found":
            return f"a step needs `op:`, one of {', '.join(OPERATIONS)}"
        case "union_tag_invalid":
            hint = did_you_mean(str(context["tag"]), OPERATIONS)
            return f"unknown op {context['tag']!r}{hint} (known: {', '.join(OPERATIONS)})"
        case "literal_error":
            choices = re.findall(r"'([^']*)'", context["expected"])
            return f"expected {context['expected']}, got {given!r}{did_you_mean(str(given), choices)}"
        case "value_error" | "assertion_error":
            return str(context.get("error", detail["msg"]))
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"expected a mapping of keys, got {_kind(given)}"
        case _:
            wanted = detail["msg"].replace("Input should be", "expected").replace("a valid array", "a list")
            return f"{wanted}, got {_kind(given) if isinstance(given, dict | list) else repr(given)}"


def _keys(path: KeyPath, data: Any) -> Sequence[str]:
    """The keys that are known at `path`."""
    match path:
        case ("steps", int()):
            return list(OPERATIONS[_at(data, path)["op"]].model_fields)
        case ("calibration",):
            return list(Calibration.model_fields)
        case ("calibration", "texts", int()):
            return list(TextSource.model_fields)
        case ("gate",):
            return list(Gate.model_fields)
        case ():
            return list(Recipe.model_fields)
    return []


def _kind(value: Any) -> str:
    names = {dict: "a mapping of keys", list: "a list", str: f"the text {value!r}", type(None): "nothing"}
    return names.get(type(value), repr(value))
