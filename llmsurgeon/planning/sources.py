"""The calibration of a recipe as the text that is wanted, and the kinds that it is of."""

from __future__ import annotations

import torch

from llmsurgeon.errors import SurgeryError
from llmsurgeon.model.costs import human
from llmsurgeon.planning.opened import DescribedModel, bytes_of
from llmsurgeon.progress import remark
from llmsurgeon.recipe.recipe import Calibration as Asked
from llmsurgeon.recipe.recipe import Recipe
from llmsurgeon.text.kinds import ALL, kinds_of
from llmsurgeon.text.wanted import Calibration, Source
from llmsurgeon.walk.memory import room


def text_wanted(asked: Asked, tokens: int, encoder: bool) -> Calibration:
    """What a recipe's `calibration` asks for, `tokens` of it, of a model that is an encoder or not."""
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
        asked.sampled_share(encoder),
        sources,
    )


def mixed(parent: DescribedModel, asked: Asked) -> Asked:
    """A calibration on named text, with the share that the model writes beside it where it leaves that open.

    A model that does not fit in memory is read layer by layer, and writes nothing: then the named text is all.
    """
    if not (asked.text or asked.dataset) or asked.self_share is not None:
        return asked
    share = asked.sampled_share(bool(parent.family.encoder))
    if share and (wants := too_large(parent)):
        remark(f"{parent.name}: {wants}, so none is sampled beside the text that is given")
        share = 0.0
    return asked.model_copy(update={"self_share": share})


def too_large(parent: DescribedModel, dtype: torch.dtype | None = None) -> str | None:
    """Why a model cannot be in memory as a whole, to sample text from; None where it can.

    dtype: what it is computed in; None: what it is where nothing else is asked for.
    """
    left, size = room(), bytes_of(parent.meta(), dtype or parent.computed_in(None, "cpu"))
    if left is None or size <= left.bytes:
        return None
    return f"text is sampled from the whole model, {human(size)}B, and {left.limit} is {human(left.bytes)}B"


def check_kinds(recipe: Recipe, encoder: bool) -> None:
    """Raise SurgeryError where the gate names a kind of which there will be no text to judge on."""
    asked = recipe.calibration
    there = text_wanted(asked, max(asked.tokens, asked.sequence_length), encoder).kinds
    for kind in (recipe.gate and recipe.gate.kinds) or ():
        if kind not in (ALL, *there):
            raise SurgeryError(
                f"gate.kinds.{kind}: the calibration has no text of this kind to judge on; it has {', '.join(there)}, "
                f"and {ALL} stands for each of them"
            )
