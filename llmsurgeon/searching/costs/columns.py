"""A model as a row of counts: how many of each part it has. Times of models are linear in them.

Parts are attentions, each of its own, and FFNs, whose time is linear in the width between a few knots. What is left is
the rest, and the rows of embedding and head.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from llmsurgeon.model.parts import AttentionSpec, FFNSpec
from llmsurgeon.model.spec import LayerSpec, ModelSpec

REST, ROWS = "rest", "rows"


@dataclass(frozen=True)
class Columns:
    """attentions: of which each is a column; knots: kind of FFN (of width 0) -> widths that are columns, ascending.

    vocab: rows of embedding and head that count as one.
    """

    attentions: tuple[AttentionSpec, ...]
    knots: dict[FFNSpec, tuple[int, ...]]
    vocab: int

    @classmethod
    def of(cls, layers: Iterable[LayerSpec], parent: ModelSpec) -> Columns:
        """What it takes to tell these layers apart, for models that are made of `parent`."""
        layers, own = [*parent.layers, *layers], Counter(ffn.width for layer in parent.layers for ffn in layer.ffns)
        usual = max(own, key=lambda width: own[width], default=0)
        attentions = dict.fromkeys(part for layer in layers for part in layer.attentions)
        widths: dict[FFNSpec, set[int]] = defaultdict(set)
        for ffn in (ffn for layer in layers for ffn in layer.ffns):
            widths[_kind(ffn)].add(ffn.width)
        return cls(tuple(attentions), {kind: _knots(found, usual) for kind, found in widths.items()}, parent.vocab)

    @property
    def ffns(self) -> tuple[FFNSpec, ...]:
        """The FFNs that are columns."""
        return tuple(replace(kind, width=width) for kind, widths in self.knots.items() for width in widths)

    def row(self, spec: ModelSpec) -> Counter[Any]:
        """How much of each column a model has."""
        found: Counter[Any] = Counter({REST: 1.0, ROWS: spec.vocab / self.vocab})
        for layer in spec.layers:
            found.update(self.of_layer(layer))
        return found

    def of_layer(self, layer: LayerSpec) -> Counter[Any]:
        """How much of each column a layer has.

        Raises:
            KeyError: it has a part that is none of them, nor between two.
        """
        found: Counter[Any] = Counter()
        for attention in layer.attentions:
            if attention not in self.attentions:
                raise KeyError(attention)
            found[attention] += 1
        for ffn in layer.ffns:
            found.update(self._between(ffn))
        return found

    def _between(self, ffn: FFNSpec) -> Counter[Any]:
        """An FFN as a mixture of the two knots around its width."""
        kind, width = _kind(ffn), ffn.width
        knots = self.knots[kind]
        if width in knots:
            return Counter({ffn: 1})
        if not knots[0] < width < knots[-1]:
            raise KeyError(ffn)
        above = next(knot for knot in knots if knot > width)
        below = max(knot for knot in knots if knot < width)
        share = (width - below) / (above - below)
        mixed = {replace(kind, width=below): 1 - share, replace(kind, width=above): share}
        return Counter(mixed)


def _kind(ffn: FFNSpec) -> FFNSpec:
    return replace(ffn, width=0)


def _knots(widths: set[int], usual: int) -> tuple[int, ...]:
    """All of three widths or fewer; of more the ends, the usual one, and the one midway between it and the least."""
    if len(widths) <= 3:
        return tuple(sorted(widths))
    ends = {min(widths), max(widths), min(widths, key=lambda width: abs(width - usual))}
    middle = (min(widths) + min(usual, max(widths))) / 2
    return tuple(sorted(ends | {min(widths - ends, key=lambda width: abs(width - middle))}))
