"""A kind of part: one linear map where an FFN would be, x -> W x + b."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from llmsurgeon.model.parts import FFNS, FFNSpec, Touch


@dataclass(frozen=True)
class LinearSpec(FFNSpec):
    """A linear map from the model's width to the model's width, with a bias."""

    kind: ClassVar[str] = "linear"
    as_family: ClassVar[bool] = False
    own_kind: ClassVar[str | None] = "has a linear map in the place of its FFN"
    forbids: ClassVar[frozenset[Touch]] = frozenset({Touch.REWRITES_NEURONS, Touch.REPLACES_FFN})
    in_order: ClassVar[str] = "cut first, linear_run comes last"
    code: ClassVar[Path | None] = Path(__file__).with_name("surgeon_linear.py")

    def entry(self, hidden):
        return {**super().entry(hidden), "kind": self.kind}


FFNS["linear"] = LinearSpec
