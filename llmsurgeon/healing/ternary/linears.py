"""What became of each linear that was made ternary: records for surgery.json, and their summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TernaryLinear:
    """One linear of the student's layer `layer`. Errors are ||change of its output||^2 relative to the output.

    zeros: share of the codes; rounding: what plain rounding of the same weight would err.
    moved: held-out error of the alignment relative to none.
    """

    layer: int
    linear: str
    error: float
    rounding: float
    zeros: float
    moved: float

    def to_dict(self) -> dict[str, Any]:
        """For surgery.json."""
        fields = dict(vars(self))
        return {"block": fields.pop("layer"), **fields}


def summary(linears: Sequence[TernaryLinear]) -> str:
    """One line for the model card."""
    mean = sum(entry.error for entry in linears) / len(linears)
    rounding = sum(entry.rounding for entry in linears) / len(linears)
    zeros = sum(entry.zeros for entry in linears) / len(linears)
    return (
        f"Ternarised {len(linears)} linears, codes and scales fitted to calibration text: their outputs err by "
        f"{mean:.3f} of their size (squared; rounding {rounding:.3f}), {100 * zeros:.0f} % of the codes are 0."
    )
