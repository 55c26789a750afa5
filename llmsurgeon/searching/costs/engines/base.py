"""What an engine answers about models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from llmsurgeon.evaluation.speed import Bench
from llmsurgeon.model.spec import ModelSpec
from llmsurgeon.searching.costs.shapes import Described, Shapes


@dataclass(frozen=True)
class Setting:
    """How an engine runs.

    type: what weights are stored and computed in, in the engine's own word; None: as the checkpoint has them.
    batch, context: sequences at a time, and tokens that each has read.
    threads: of the CPU; None: as many as there are.
    """

    type: str | None
    batch: int = 1
    context: int = 512
    threads: int | None = None
    device: str = "cpu"


class Kind(ABC):
    """An engine. It is asked with a `Setting`, and keeps nothing."""

    name: ClassVar[str]

    @abstractmethod
    def type_of(self, text: str) -> str | None:
        """The type that a user's word names; None where there is none and that is enough.

        Raises:
            SurgeryError: the engine has no such type.
        """

    @abstractmethod
    def check(self, setting: Setting) -> None:
        """Raise SurgeryError where the engine cannot run so."""

    @abstractmethod
    def require(self) -> None:
        """Raise SurgeryError where the engine is not installed."""

    @abstractmethod
    def version(self) -> str:
        """What its speed depends on: its version, and those of what it computes with."""

    @abstractmethod
    def grain(self, setting: Setting) -> int:
        """Widths that it runs well are multiples of it."""

    @abstractmethod
    def weight_bytes(self, model: Described, setting: Setting) -> int:
        """Bytes of all weights."""

    @abstractmethod
    def kv_number_bytes(self, model: Described, setting: Setting) -> int:
        """Bytes of one number of the KV cache."""

    @abstractmethod
    def misfit(self, shapes: Shapes, spec: ModelSpec) -> str | None:
        """Why it cannot run this model, None where it can."""

    @abstractmethod
    def timed(self, model: Described, setting: Setting, steps: int) -> AbstractContextManager[Callable[[], float]]:
        """The model with random weights, loaded. Each call is a round: seconds of one of `steps` decode steps that
        follow on the context, or of reading the context where there are no steps."""

    @abstractmethod
    def bench(self, model: Path, parent: Path, setting: Setting, rounds: int) -> Bench:
        """Two written models, timed in turn."""
