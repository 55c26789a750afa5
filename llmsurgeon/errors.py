"""Errors a user can act on. The CLI prints them without a traceback and exits with code 2."""

from __future__ import annotations

from typing import Any


class SurgeryError(Exception):
    """An expected failure: says what is wrong, where, what was expected and what to do next."""


class RecipeError(SurgeryError):
    """A recipe that cannot be read or does not fit the model; carries every problem found."""

    def __init__(self, problems: list[str], where: str = "recipe") -> None:
        self.problems = problems
        super().__init__(f"{where}: " + ("; ".join(problems) if len(problems) == 1 else "\n  - ".join(["", *problems])))


class CheckpointError(SurgeryError):
    """A checkpoint on disk that is damaged, unsafe or does not match its config."""


class GateFailed(SurgeryError):
    """A finished run whose quality missed the recipe's gate (exit code 3; the output is kept).

    outcome: what the run made, an `llmsurgeon.run.Outcome`.
    """

    def __init__(self, message: str, outcome: Any = None) -> None:
        super().__init__(message)
        self.outcome = outcome


class Stopped(SurgeryError):
    """A run that was asked to end (SIGTERM) and has saved its state; started again, it goes on (exit code 143)."""
