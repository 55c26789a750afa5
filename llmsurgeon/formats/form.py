"""What a form of a checkpoint is, and a form's answer about one model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from llmsurgeon.checkpoint.transform import TransformedWeights, WeightTransform
from llmsurgeon.formats.names import CheckpointName, FormName
from llmsurgeon.formats.tensor_names import legacy
from llmsurgeon.model.families import Family
from llmsurgeon.model.spec import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Config = Mapping[str, Any]
# Of a model (its blocks, its family, its config): a sentence on what stands against something, None where nothing does.
Misfit = Callable[[ModelSpec, Family, Config], str | None]


@dataclass(frozen=True)
class Body:
    """One model as a form describes it.

    config: config.json.
    spec: what it describes, padding included.
    loads: where such a checkpoint loads, in a sentence or two.
    code: files to ship beside it.
    parts: kind -> file of those parts whose forward surgeon_blocks.py does not have.
    why: why it is described so, where that goes without the reason for choosing the form.
    alone: whether the student's own tensors run under `config`; else they run under the surgeon form's, and are padded
        to the shapes of `config`.
    """

    config: dict[str, Any]
    spec: ModelSpec
    loads: str
    code: tuple[Path, ...] = ()
    parts: Mapping[str, Path] = field(default_factory=dict)
    why: str | None = None
    alone: bool = False


class Packing(Protocol):
    """How some tensors of a described model are packed."""

    @property
    def transforms(self) -> tuple[WeightTransform, ...]:
        """The edits that pack."""
        ...

    @property
    def quantization_config(self) -> dict[str, Any]:
        """What config.json says of it."""
        ...

    def saved(self, meta: Mapping[str, Tensor]) -> int:
        """Bytes that packing saves of these tensors."""
        ...


class Whole(Protocol):
    """The vision-language model around a text tower."""

    def outer(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The tower's tensors under their names in the whole model, and the others."""
        ...

    def config_of(self, written: Written) -> dict[str, Any]:
        """config.json of the whole model."""
        ...


@dataclass(frozen=True)
class Packs:
    """What a form that packs does: `names` finds, by their values, the weights that it can pack; `pack` says how.

    names: (weights, the empty model) -> names.
    pack: (the empty model, its tensors without data, names, the class that is to read them) -> packing.
    """

    names: Callable[[Mapping[str, Tensor], PreTrainedModel], list[str]]
    pack: Callable[[PreTrainedModel, Mapping[str, Tensor], Iterable[str], Any], Packing]


def as_it_is(config: Config) -> Config:
    """The config itself."""
    return config


@dataclass(frozen=True, kw_only=True)
class Form:
    """A form that a model is written in; `FORMATS` lists all.

    misfit: what keeps the form from holding a model.
    limit: of a family, (why the form holds none of its models or not all, whether it holds none), None without limit.
    plain: the form whose tensors this one packs, and which says what it cannot hold.
    towers: whether it holds vision-language models.
    """

    name: FormName
    misfit: Misfit
    limit: Callable[[Family], tuple[str, bool] | None] = lambda family: None
    plain: Form | None = None
    towers: bool = False


@dataclass(frozen=True, kw_only=True)
class CheckpointForm(Form):
    """A form that is a folder with a config.json.

    describe: a model in this form.
    unwanted: why `auto` goes on to the next form; None where the form is made only when it is asked for.
    packs: how the tensors of `plain` are packed.
    recognises: true for a config.json in this form; None for what is left when no form recognises it.
    read: config.json -> one that `family_of` knows.
    unread: why a checkpoint in this form is not read back, None where it is.
    ships_code: whether transformers loads it with code that lies in the checkpoint.
    old_names: whether tensors are called as published, where transformers has renamed them since.
    """

    name: CheckpointName
    describe: Callable[[ModelSpec, Family, Config], Body]
    unwanted: Misfit | None = None
    packs: Packs | None = None
    recognises: Callable[[Config], bool] | None = None
    read: Callable[[Config], Config] = as_it_is
    unread: str | None = None
    ships_code: bool = False
    old_names: bool = False


@dataclass(frozen=True)
class Written:
    """A model in its form.

    config: config.json, of a vision-language model the text tower's.
    code: files to ship beside it.
    parts: kind -> file of those parts whose forward surgeon_blocks.py does not have.
    why: why this form and none that more engines read.
    loads: where a checkpoint in this form loads, in a sentence or two.
    spec: what the checkpoint describes; padding included.
    student: the config under which the student's own tensors run, before `transforms`.
    transforms: what the form asks of the weights, so that they fit `config`.
    tower: the vision-language model that this is the text tower of.
    packing: what is packed on top of that; of a form that packs, set once it is known which tensors.
    """

    form: CheckpointForm
    config: dict[str, Any]
    code: tuple[Path, ...]
    why: str
    loads: str
    spec: ModelSpec
    student: dict[str, Any]
    transforms: tuple[WeightTransform, ...] = ()
    parts: Mapping[str, Path] = field(default_factory=dict)
    tower: Whole | None = None
    packing: Packing | None = None

    @property
    def format(self) -> CheckpointName:
        """The form's name."""
        return self.form.name

    def fit(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The student's weights as `config` describes them, under the names of today's classes."""
        return TransformedWeights(weights, self.transforms) if self.transforms else weights

    def published(self, weights: Mapping[str, Tensor], family: Family) -> Mapping[str, Tensor]:
        """The student's weights as they are stored, under the names that the file has."""
        made = legacy(self.fit(weights), family) if self.form.old_names else self.fit(weights)
        if self.packing:
            made = TransformedWeights(made, self.packing.transforms)
        return self.tower.outer(made) if self.tower else made

    @property
    def file_config(self) -> dict[str, Any]:
        """What config.json says."""
        if self.packing:
            return {**self.config, "quantization_config": self.packing.quantization_config}
        return self.tower.config_of(self) if self.tower else self.config


def modeling_files(names: tuple[str, ...]) -> tuple[Path, ...]:
    """Files of modeling/ that ship inside checkpoints."""
    return tuple(Path(str(files("llmsurgeon"))) / "modeling" / name for name in names)
