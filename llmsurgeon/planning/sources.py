"""The calibration of a recipe as the text that is wanted, and the kinds that it is of."""

from __future__ import annotations

from llmsurgeon.errors import SurgeryError
from llmsurgeon.recipe.recipe import Calibration as Asked
from llmsurgeon.recipe.recipe import Recipe
from llmsurgeon.text.kinds import ALL, kinds_of
from llmsurgeon.text.wanted import Calibration, Source


def text_wanted(asked: Asked, tokens: int) -> Calibration:
    """What a recipe's `calibration` asks for, `tokens` of it."""
    sources = tuple(
        Source(source.text, source.dataset, kinds_of([source.self] if source.self else []), source.weight)
        for source in asked.texts or ()
    )
    return Calibration(
        asked.text,
        asked.dataset,
        tokens,
        asked.sequence_length,
        asked.seed,
        asked.sentences,
        asked.self_share or 0.0,
        sources,
    )


def check_kinds(recipe: Recipe) -> None:
    """Raise SurgeryError where the gate names a kind of which there will be no text to judge on."""
    asked = recipe.calibration
    there = text_wanted(asked, max(asked.tokens, asked.sequence_length)).kinds
    for kind in (recipe.gate and recipe.gate.kinds) or ():
        if kind not in (ALL, *there):
            raise SurgeryError(
                f"gate.kinds.{kind}: the calibration has no text of this kind to judge on; it has {', '.join(there)}, "
                f"and {ALL} stands for each of them"
            )
