"""What every part of a layer says of itself, whatever its kind, and the ways in which a step may touch a model."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import ClassVar

SUB_NORM = "has a norm before an output projection"


class Touch(StrEnum):
    """What a step does to a model. Steps declare what they do, parts what they do not bear: neither names the other."""

    CUTS_VOCABULARY = "cuts_vocabulary"
    REMOVES_LAYERS = "removes_layers"
    REMOVES_ATTENTION = "removes_attention"
    REMOVES_FFN = "removes_ffn"
    # Another kind of part takes the place of an attention, of an FFN.
    REPLACES_ATTENTION = "replaces_attention"
    REPLACES_FFN = "replaces_ffn"
    # Other rows for an attention's heads; for an FFN's neurons, where some go or those of several layers join.
    REWRITES_HEADS = "rewrites_heads"
    REWRITES_NEURONS = "rewrites_neurons"
    # Other values in linears of the same shape.
    REWRITES_LINEARS = "rewrites_linears"
    # Layers read something else than the output of the one before, or at other positions.
    RECONNECTS_LAYERS = "reconnects_layers"
    # Weights follow from what the layers read, in closed form; or from gradients.
    FITS = "fits"
    TRAINS = "trains"


# A norm before the output projection is part of what that projection reads.
SUB_NORM_FORBIDS = frozenset(
    {
        Touch.REPLACES_ATTENTION,
        Touch.REPLACES_FFN,
        Touch.REWRITES_HEADS,
        Touch.REWRITES_NEURONS,
        Touch.RECONNECTS_LAYERS,
        Touch.FITS,
    }
)


@dataclass(frozen=True)
class Part:
    """A layer's attention or its feed-forward network.

    kind: its name in `block_configs`, and in the tables of this room.
    own_kind: what it has that no family's own class has, as a verb and its object; None without such a thing.
    forbids: what it does not bear being done to it; `in_order` then says how to go about it.
    code: the file with its forward, where surgeon_blocks.py has none: a function `install(block, entry, config)` that
        puts the part into a block of its family's own. It ships in checkpoints and imports nothing of ours.
    """

    kind: ClassVar[str]
    own_kind: ClassVar[str | None] = None
    forbids: ClassVar[frozenset[Touch]] = frozenset()
    in_order: ClassVar[str] = ""
    code: ClassVar[Path | None] = None

    @property
    def normed(self) -> bool:
        """True where an RMSNorm stands before its output projection (SubLN)."""
        return False

    @property
    def bit_linears(self) -> bool:
        """True where its linears are BitLinears, whose output is not linear in their weights."""
        return False

    def refusal(self, touches: frozenset[Touch]) -> str | None:
        """Why a step that does this cannot be done to a layer with this part, as a verb and more; None where it can."""
        if self.forbids & touches:
            return f"{self.own_kind}; {self.in_order}"
        if self.normed and SUB_NORM_FORBIDS & touches:
            return f"{SUB_NORM}, which it does not know; do it before ternary with sub_norm"
        return None
