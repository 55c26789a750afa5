"""What a checkpoint says of its own making, surgery.json and recipe.yaml, read back.

Both may have been edited, or come from a stranger: what does not have the form that `run` writes is left out, and said.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmsurgeon.checkpoint.inside import text_inside
from llmsurgeon.errors import CheckpointError
from llmsurgeon.model.costs import Costs
from llmsurgeon.progress import remark
from llmsurgeon.report.origin import Origin

Layer = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class OfAKind(_Part):
    """The quality of a decoder on one kind of text."""

    perplexity: float
    parent_perplexity: float = Field(gt=0)
    perplexity_ratio: float
    perplexity_ratio_interval: list[float] | None = Field(default=None, min_length=2, max_length=2)


class Predictions(_Part):
    """The quality of a decoder, beside its parent's."""

    tokens: int
    perplexity: float
    parent_perplexity: float = Field(gt=0)
    kl: float
    top1_agreement: float
    kinds: dict[str, OfAKind] = Field(default_factory=dict)


class States(_Part):
    """The quality of an encoder, beside its parent's."""

    tokens: int
    hidden_cosine: float
    pooled_cosine: float
    masked_kl: float | None
    masked_top1_agreement: float | None
    kinds: dict[str, dict[str, Any]] = Field(default_factory=dict)


class Surgery(_Part):
    """surgery.json: what is read back of it. Other keys go along."""

    parent: str
    before: Costs
    evaluation: Predictions | States | None = None
    calibration: str | None = None
    gate_missed: list[str] = Field(default_factory=list)
    parents: list[list[Layer]] | None = None
    origin: Origin | None = None


@dataclass(frozen=True)
class Records:
    """surgery: surgery.json as it is; recipe: the text of recipe.yaml; before: costs of the parent, `origin`."""

    surgery: dict[str, Any]
    recipe: str
    before: Costs
    origin: Origin | None = None


def read_surgery(folder: Path) -> Surgery | None:
    """surgery.json of a checkpoint, None where it has none, or one that is not of the form that `run` writes."""
    path = folder / "surgery.json"
    if not path.is_file():
        return None
    try:
        return Surgery.model_validate_json(text_inside(folder, path.name))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole file"
        remark(f"{path}: not as llmsurgeon writes it ({where}: {first['msg']}); what it says is left out")
    except (OSError, CheckpointError) as error:
        remark(f"{error}; what it says is left out")
    return None


def read_recipe(folder: Path) -> str | None:
    """The text of a checkpoint's recipe.yaml, None where it has none that can be read."""
    try:
        return text_inside(folder, "recipe.yaml")
    except (OSError, CheckpointError):
        return None


def read_records(folder: Path) -> Records | None:
    """How a checkpoint was made, None where it does not say, or not in a form that is known."""
    surgery, recipe = read_surgery(folder), read_recipe(folder)
    if surgery is None or recipe is None:
        return None
    return Records(surgery.model_dump(mode="json", exclude_unset=True), recipe, surgery.before, surgery.origin)
