"""The checkpoint that is operated on, opened and held against its config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsurgeon.checkpoint.companions import companions_of
from llmsurgeon.checkpoint.opening import has_weights, open_checkpoint, read_config
from llmsurgeon.checkpoint.source import Checkpoint
from llmsurgeon.checkpoint.transform import rebase
from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats.configs import config_notes, normalised
from llmsurgeon.formats.dtypes import computed_in, plain_dtype, stored_dtype
from llmsurgeon.formats.form import Written
from llmsurgeon.formats.models import empty_model, expected_shapes
from llmsurgeon.formats.names import WantedForm
from llmsurgeon.formats.reading import read_model, refuse_quantised, refuse_scoring_head
from llmsurgeon.formats.towers import Tower, tower_of
from llmsurgeon.formats.write import write_config
from llmsurgeon.model.costs import Costs, costs
from llmsurgeon.model.families import Family, family_of
from llmsurgeon.model.spec import ModelSpec
from llmsurgeon.model.ternary import is_ternary
from llmsurgeon.operations import Subject
from llmsurgeon.operations.ternary_linears import linears_of
from llmsurgeon.progress import remark


@dataclass(frozen=True)
class DescribedModel:
    """A model on the table, as its config.json tells: enough to plan by.

    `weights` has canonical names, on the meta device where there are no others. `model_type` is what config.json says;
    `config` is what this tool reads it as. Of a vision-language checkpoint config, family and spec are those of the
    text tower, and `weights` holds the rest of the file, too. `notes` tells where tensors and config.json disagree and
    how that was read, and what is not copied along.
    """

    name: str
    config: dict[str, Any]
    family: Family
    spec: ModelSpec
    weights: Mapping[str, Tensor]
    model_type: str
    tower: Tower | None = None
    notes: tuple[str, ...] = ()

    @property
    def original(self) -> DescribedModel:
        """The model as it came."""
        return self

    @property
    def beside(self) -> frozenset[str]:
        """Names of the tensors that only go along with a text tower."""
        return self.tower.beside if self.tower else frozenset()

    def form(self, spec: ModelSpec, wanted: WantedForm) -> Written:
        """The form in which a model of this description is written.

        Raises:
            SurgeryError: the format that is asked for cannot express it.
        """
        write = self.tower.write if self.tower else write_config
        return write(spec, self.family, self.config, wanted)

    def costs(self, spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]]) -> Costs:
        """Costs of a model with these tensors; what goes along counts as parameters and on the disk alone."""
        size = self.dtype.itemsize
        own = {name: shape for name, shape in shapes.items() if name not in self.beside}
        numbers = sum(prod(shapes[name]) for name in self.beside if name in shapes)
        made = costs(spec, self.family, own, size)
        return replace(made, parameters=made.parameters + numbers, disk_bytes=made.disk_bytes + numbers * size)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype most numbers are stored in."""
        return stored_dtype(self.meta())

    def computed_in(self, asked: torch.dtype | None, device: str) -> torch.dtype:
        """The dtype that activations have: `asked`, else by the stored weights, whatever the command."""
        meta = self.meta()
        own = {name: meta[name] for name in meta if name not in self.beside}
        return computed_in(plain_dtype(own, self.config), asked, device)

    def subject(self, scores: Mapping[str, Any]) -> Subject:
        """The parent as operations see it."""
        return Subject(self.spec, self.family, frozenset(self.weights), scores)

    def meta(self) -> Mapping[str, Tensor]:
        """Names, shapes and dtypes."""
        return self.on_meta(self.weights)

    def on_meta(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Weights that were made of this model's, without data."""
        return weights


@dataclass(frozen=True)
class OpenedCheckpoint(DescribedModel):
    """A model with its weights: what is measured, healed and written needs one.

    `whole` is the model as it came, where its vocabulary was trimmed.
    """

    checkpoint: Checkpoint = field(kw_only=True)
    whole: OpenedCheckpoint | None = field(default=None, kw_only=True)

    @property
    def original(self) -> OpenedCheckpoint:
        """The model as it came."""
        return self.whole or self

    def on_meta(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Weights that were made of this model's, without data."""
        return rebase(weights, self.checkpoint.meta())


def open_model(model: str, revision: str | None = None, trust_remote_code: bool = False) -> OpenedCheckpoint:
    """Open a checkpoint and hold its tensors against its config.

    `trust_remote_code` lets code that its tokenizer or processor brings along run, and go along into what is written.

    Raises:
        SurgeryError: unsupported family, impossible config, or tensors that differ from what it promises.
    """
    return opened_model(open_checkpoint(model, revision=revision, trust_remote_code=trust_remote_code))


def opened_model(checkpoint: Checkpoint) -> OpenedCheckpoint:
    """As `open_model`, of a checkpoint that is open already."""
    made = read_model(checkpoint)
    spec, model_type = made.family.describe(made.config), checkpoint.config["model_type"]
    notes = (*made.notes, *(checkpoint.companions.notes if checkpoint.path.is_dir() else ()))
    for note in notes:
        remark(f"{checkpoint.name}: {note}")
    return OpenedCheckpoint(
        checkpoint.name,
        made.config,
        made.family,
        spec,
        made.weights,
        model_type,
        made.tower,
        notes,
        checkpoint=checkpoint,
    )


def open_config(model: str, revision: str | None = None, trust_remote_code: bool = False) -> DescribedModel:
    """A model from its config.json alone: enough for a plan.

    Raises:
        SurgeryError: unsupported family, or impossible config.
    """
    raw = read_config(model, revision)
    refuse_quantised(raw, model)
    if tower_of(raw) is None:
        refuse_scoring_head(raw, model)
    tower = tower_of(raw)
    config = normalised(tower.text if tower else raw)
    family = family_of(config)
    dtype = getattr(torch, str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16").removeprefix("torch."))
    shapes = expected_shapes(empty_model(config))
    weights = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    folder = Path(model).expanduser()
    notes = (
        *config_notes(raw, tower.text if tower else None),
        *(companions_of(folder, trust_remote_code).notes if folder.is_dir() else ()),
    )
    for note in notes:
        remark(f"{model}: {note}")
    return DescribedModel(model, config, family, family.describe(config), weights, raw["model_type"], tower, notes)


def open_known(model: str, revision: str | None = None, trust_remote_code: bool = False) -> DescribedModel:
    """With its weights where they are on this disk, else from config.json alone.

    Raises:
        SurgeryError: as `open_model`.
    """
    opened = open_model if has_weights(model) else open_config
    return opened(model, revision, trust_remote_code)


def check_length(parent: DescribedModel, length: int, setting: str) -> None:
    """Raise SurgeryError where sequences of `length` tokens, as `setting` asks for, exceed the model's positions."""
    limit = parent.spec.max_positions
    if limit and length > limit:
        raise SurgeryError(f"{parent.name}: {setting} is {length}, and the model has {limit} positions; lower it")


def bytes_of(meta: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> int:
    """Bytes of tensors, of which no byte is read: in their own dtypes, or all in `dtype`."""
    return sum(tensor.numel() * (dtype or tensor.dtype).itemsize for tensor in map(meta.__getitem__, meta))


def shapes_of(meta: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name -> shape."""
    return {name: tuple(meta[name].shape) for name in meta}


def ternary_by_layer(parent: DescribedModel) -> list[tuple[str, ...]] | None:
    """Paths inside each layer of the linears whose weights are ternary, told by a sample of their rows.

    None where there are no weights to look at: of a config alone, and of GGUF files, which are decoded.
    """
    if not isinstance(parent, OpenedCheckpoint) or parent.checkpoint.path.is_file():
        return None
    subject, family = parent.subject({}), parent.family
    found = []
    for index in range(len(parent.spec.layers)):
        names = () if parent.spec.layers[index].branches else linears_of(subject, index)
        weights = {name: parent.weights[family.layer(index) + name] for name in names}
        looked = {name: w.T if family.transposed else w for name, w in weights.items()}
        found.append(tuple(n.removesuffix(".weight") for n, w in looked.items() if is_ternary(w[:: len(w) // 64 + 1])))
    return found
