"""Calibration sequences, each of which knows what kind of text it is. S sequences of T tokens."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from llmsurgeon.errors import SurgeryError

Item = TypeVar("Item", bound=Hashable)


@dataclass(frozen=True)
class Sequences:
    """Tokens [S, T], int64, and the kind of each sequence: the name of its file or dataset, or a kind of self text."""

    tokens: Tensor
    kinds: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, mask: Tensor) -> Sequences:
        """Those of a mask [S]."""
        return Sequences(self.tokens[mask], tuple(kind for kind, taken in zip(self.kinds, mask, strict=True) if taken))

    def named(self) -> dict[str, Tensor]:
        """The mask [S] of each kind, in the order in which kinds come first."""
        return {kind: of_kind(self.kinds, kind) for kind in dict.fromkeys(self.kinds)}


def of_kind(kinds: Sequence[str], kind: str) -> Tensor:
    """The mask [S] of the sequences of one kind."""
    return torch.tensor([each == kind for each in kinds], dtype=torch.bool)


def held_out(kinds: Sequence[str], share: float) -> Tensor:
    """Mask [S] of about `share` of the sequences, of each kind its part, spread evenly over its text; at least one of
    them all, and not all of them.

    Raises:
        SurgeryError: there is one sequence alone.
    """
    count = len(kinds)
    if count < 2:
        raise SurgeryError(
            f"{count} calibration sequence cannot be split into training and held-out ones; "
            "raise calibration tokens or lower sequence_length"
        )
    held = min(count - 1, max(1, round(count * share)))
    # Kind after kind, so that even steps take of each what it has of the whole.
    places = {kind: place for place, kind in enumerate(dict.fromkeys(kinds))}
    order = sorted(range(count), key=lambda row: (places[kinds[row]], row))
    mask = torch.zeros(count, dtype=torch.bool)
    mask[[order[int((place + 0.5) * count / held)] for place in range(held)]] = True
    return mask


def spread(weights: Mapping[Item, float], count: int) -> list[Item]:
    """`count` items, each as often as its weight says, in an order of which every beginning has about these shares.

    Next comes the item that is furthest behind its share; of two alike the one that is named first.
    """
    total = sum(weights.values())
    drawn, found = dict.fromkeys(weights, 0), list[Item]()
    for place in range(1, count + 1):
        item = max(weights, key=lambda each: weights[each] / total * place - drawn[each])
        drawn[item] += 1
        found.append(item)
    return found
