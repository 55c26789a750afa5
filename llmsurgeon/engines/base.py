"""What an engine answers about models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

from llmsurgeon.engines.shapes import Described, Shapes
from llmsurgeon.evaluation.speed import Bench
from llmsurgeon.model.spec import ModelSpec
from llmsurgeon.progress import Say, silent


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


@dataclass(frozen=True)
class Asked:
    """Models to be timed, and how, as `bench` was asked.

    sizes: prompt, new_tokens, rounds; None for what a model's positions allow.
    dtype, type: what weights are in, of an engine that computes in a dtype, or that reads files of a type.
    anew: files that are in some type already are written in `type`, too.
    engine_python: the Python of the environment that the engine is installed in; None: this one.
    """

    model: str
    against: str | None
    sizes: dict[str, Any]
    batch: int = 1
    threads: int | None = None
    device: str = "auto"
    dtype: str | None = None
    type: str | None = None
    anew: bool = False
    revision: str | None = None
    trust_remote_code: bool = False
    say: Say = silent
    graph: bool = False
    engine_python: str | None = None


class Benched(ABC):
    """An engine in which written models are timed. It keeps nothing.

    elsewhere: whether it may be installed in another environment.
    """

    name: ClassVar[str]
    elsewhere: ClassVar[bool] = False

    @abstractmethod
    def bench(self, asked: Asked) -> Bench:
        """A written model, timed in turn with another where one is named.

        Raises:
            SurgeryError: it is not installed, or cannot do what is asked.
        """


class Kind(Benched):
    """An engine that searches measure in, too. It is asked with a `Setting`.

    devices: whether it runs on others than the CPU.
    """

    devices: ClassVar[bool]

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

    def type_in(self, model: Described, setting: Setting) -> str | None:
        """The type that a model is stored and computed in: the setting's, where that names one."""
        return setting.type

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
    def at(self, asked: Asked, setting: Setting) -> Asked:
        """The same models, timed at a setting."""
