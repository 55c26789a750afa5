"""The recipe step of the closed-form refit; the computation is in healing/refit.py."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from llmsurgeon.operations.base import Plan, Step, Subject


class Refit(Step):
    """Fit the output projection of every changed block to the parent's hidden states by ridge regression.

    ridge: multiple of mean(diag(A^T A)); a list is tried per block on held-out tokens, and the best is kept.
    """

    op: Literal["refit"] = "refit"
    heals: ClassVar[bool] = True
    tokens: Annotated[int, Field(ge=1)] | None = None
    ridge: Annotated[float, Field(gt=0)] | tuple[Annotated[float, Field(gt=0)], ...] = (1e-3, 1e-2, 1e-1, 1.0)
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.125

    def plan(self, subject: Subject) -> Plan:
        return Plan(subject.spec, ())
