"""What a healing step is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from torch import Tensor

from llmsurgeon.healing.distill.data import Rows
from llmsurgeon.model.families import Family
from llmsurgeon.model.spec import ModelSpec
from llmsurgeon.text.sequences import Sequences
from llmsurgeon.walk.runner import LayerRunner


@dataclass(frozen=True)
class HealingContext:
    """A student beside its parent, as a healing step finds them.

    parent, parent_config, parent_spec: the parent layer by layer, its normalised config and description.
    fingerprint: names the parent as it computes: weights, dtype, kind of device, libraries.
    config, spec, weights: the student's; its layers name those of the parent that they stand for.
    windows: calibration tokens [S, T]; kinds: what kind of text each sequence is; held_out: mask [S] of the sequences
        that only choose and judge.
    training: the text of a step that trains, from the step and the windows that may be trained on.
    folder: keeps what is done through a kill; logs: where trackers write.
    """

    parent: LayerRunner
    parent_config: dict[str, Any]
    parent_spec: ModelSpec
    fingerprint: str
    config: dict[str, Any]
    spec: ModelSpec
    weights: Mapping[str, Tensor]
    windows: Tensor
    kinds: tuple[str, ...]
    held_out: Tensor
    training: Callable[[Any, Sequences], list[Rows]]
    folder: Path
    logs: Path
    device: str
    batch: int
    say: Callable[[str], None]

    @property
    def family(self) -> Family:
        """Whose names the tensors have."""
        return self.parent.family


class Result(Protocol):
    """What the steps of one operation made of a student, for the weights, the records and the card."""

    @property
    def files(self) -> Mapping[str, Path]:
        """Name of every tensor that the last of these steps changed -> the safetensors file that holds it."""

    def behind(self, earlier: Self) -> Self:
        """The result of an earlier step and this one, for one place in the records."""

    def record(self) -> list[dict[str, Any]]:
        """What surgery.json says of it, under the operation's name."""

    def notes(self) -> list[str]:
        """Lines of the model card."""

    def lines(self) -> list[str]:
        """Lines for the terminal."""

    def pages(self, name: str) -> Mapping[str, str]:
        """Files beside the weights of the model `name`: name -> content."""
