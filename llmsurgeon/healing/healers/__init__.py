"""The steps that heal, each one file: how the step's fit is called, and what goes into the records of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmsurgeon.healing.healers.base import HealingContext, Result
from llmsurgeon.healing.healers.distill import distilled
from llmsurgeon.healing.healers.refit import refitted
from llmsurgeon.healing.healers.ternary import ternarised

# op of a step -> (what it is given, the step) -> what came of it. Records and card name results in this order.
HEALERS: dict[str, Callable[[HealingContext, Any], Result]] = {
    "ternary": ternarised,
    "refit": refitted,
    "distill": distilled,
}

__all__ = ["HEALERS", "HealingContext", "Result"]
