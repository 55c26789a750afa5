"""The recipe step of the closed-form refit; the computation is in healing/refit/."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from llmsurgeon.boundary.limits import MOST_TOKENS
from llmsurgeon.model.block_transformer import BlockTransformerSpec
from llmsurgeon.model.parts import Touch
from llmsurgeon.model.spec import ModelSpec
from llmsurgeon.operations.base import HELD_OUT, Plan, Step, Subject
from llmsurgeon.operations.fit_memory import Text, refit_bytes
from llmsurgeon.operations.fit_work import Fit, PartWork, Work, refit_work


class Refit(Step):
    """Fit the changed layers, and what later layers read, to the parent's hidden states by ridge regression.

    ridge: multiples of mean(diag(A^T A)); each layer takes the one that errs least on held-out tokens.
    held_out: share of the sequences that choose the ridge and judge the result, and fit nothing.
    align: also map the inputs of changed and later layers back to what the parent's projections read.
    join: also fit the output projection of the attention that a changed layer keeps.

    Of a block transformer it fits what lies between the two decoders, and the output projections of all layers that
    read something new; `align` and `join` have no part in that.
    """

    op: Literal["refit"] = "refit"
    touches: ClassVar[frozenset[Touch]] = frozenset({Touch.FITS})
    heals: ClassVar[bool] = True
    tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    ridge: Annotated[float, Field(gt=0)] | tuple[Annotated[float, Field(gt=0)], ...] = (0.03, 0.1, 0.3, 1.0)
    align: bool = True
    align_ridge: Annotated[float, Field(gt=0)] = 0.03
    join: bool = True
    join_ridge: Annotated[float, Field(gt=0)] = 0.3
    held_out: Annotated[float, Field(gt=0, lt=1)] = HELD_OUT

    @property
    def ridges(self) -> tuple[float, ...]:
        """The candidates as a tuple."""
        return self.ridge if isinstance(self.ridge, tuple) else (self.ridge,)

    def withholds(self) -> float | None:
        return self.held_out

    def calibration_tokens(self) -> int | None:
        return self.tokens

    def fit_bytes(self, parent: ModelSpec, student: Subject, shapes: Mapping[str, tuple[int, ...]], text: Text) -> int:
        return refit_bytes(parent, student.spec, replace(text, held_out=self.held_out))

    def fit_work(
        self, parent: ModelSpec, student: ModelSpec, passes: tuple[PartWork, PartWork], text: Text
    ) -> Work | None:
        if student.block_transformer:
            return None
        return refit_work(parent, student, passes, Fit(text, len(self.ridges), self.align, self.join))

    def plan(self, subject: Subject) -> Plan:
        subject.check(self)
        if block_transformer := subject.spec.block_transformer:
            self._check_block_transformer(subject, block_transformer)
        for layer in subject.spec.layers:
            if any(part.bit_linears for part in layer.parts):
                raise subject.refuse(
                    f"refit: layer {layer.parents[0]} has BitLinears, whose output is not linear in their weights: "
                    "heal with distill, or refit with linears: float first and make the result ternary"
                )
        return Plan(subject.spec, ())

    @staticmethod
    def _check_block_transformer(subject: Subject, spec: BlockTransformerSpec) -> None:
        """Raise SurgeryError for block transformers that have no such fit."""
        if not spec.affine or spec.decoder != "prefix":
            has = f"decoder {spec.decoder}" if spec.affine else "affine: false"
            raise subject.refuse(
                "refit: of block transformers it fits those with decoder prefix and affine: true, this one has "
                f"{has}; leave refit out (--no-refit), and train it with distill"
            )
        for layer in subject.spec.layers:
            if layer.branches:
                raise subject.refuse(
                    f"refit: behind block it fits layers one after the other, and the layers {layer.parents[0]} to "
                    f"{layer.parents[-1]} run side by side; leave refit out, or the step that joined them"
                )
