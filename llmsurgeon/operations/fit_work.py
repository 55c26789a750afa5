"""How much computing closed-form fits are, from shapes alone: for the plan, which is read before hours of work.

F features of a fit, O what it gives, D model width, T tokens, of which n fit and m judge. Work is in floating-point
operations, a multiplication and an addition being two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmsurgeon.model.spec import LayerSpec, ModelSpec
from llmsurgeon.operations.fit_memory import Text, fits_in_dual, judges_as_rows, same_as_before

# What attention and FFN of each layer multiply for a token.
PartWork = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Work:
    """What is to be computed, in floating-point operations by what computes them, as each has a rate of its own.

    layers: forward passes of layers, in their dtype. sums: Gram matrices. wide: other products in float32. solved:
    factorisations, and what is solved with them. moved: numbers of weights that are found, and kept in files.
    """

    layers: float = 0.0
    sums: float = 0.0
    wide: float = 0.0
    solved: float = 0.0
    moved: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class Fit:
    """What a refit is told: the text, how many ridges it tries, and whether it aligns and joins."""

    text: Text
    ridges: int
    align: bool
    join: bool


def regression_work(features: int, outputs: int, text: Text, ridges: int, judged: int | None = None) -> Work:
    """One ridge regression, tried with so many ridges (healing/refit/ridge.py); each is `judged`, or more is."""
    judged = ridges if judged is None else judged
    fitting, judging, cross = text.tokens - text.judging, text.judging, 2.0 * features * outputs
    if fits_in_dual(fitting, features):
        found = Work(
            sums=fitting**2 * features,
            wide=ridges * fitting * cross,
            solved=ridges * (fitting**3 / 3 + 2 * fitting**2 * outputs),
        )
    else:
        found = Work(
            sums=fitting * features**2,
            wide=fitting * cross,
            solved=ridges * (features**3 / 3 + 2 * features**2 * outputs),
        )
    if judges_as_rows(judging, features):
        return found + Work(wide=judged * judging * cross)
    return found + Work(sums=judging * features**2, wide=judging * cross + judged * features * cross)


def refit_work(parent: ModelSpec, student: ModelSpec, passes: tuple[PartWork, PartWork], fit: Fit) -> Work:
    """A refit (healing/refit/refit.py): both models through the text, and the fits of what changed or reads otherwise.

    passes: what the parts of the parent's and of the student's layers multiply for a token.
    """
    starts = [min(layer.parents) for layer in student.layers]
    spans = zip([0, *starts[1:]], [*starts[1:], len(parent.layers)], strict=True)
    found, drifted, tokens = Work(), False, fit.text.tokens
    for layer, (start, end), mine in zip(student.layers, spans, passes[1], strict=True):
        found += Work(layers=tokens * sum(map(sum, passes[0][start:end])))
        new = end - start != 1 or not same_as_before(layer, parent)
        if new or drifted:
            found += _layer_work(layer, parent, student.hidden, mine, (new, drifted), fit)
        else:
            found += Work(layers=tokens * sum(mine))
        drifted = drifted or new
    return found


def _layer_work(
    layer: LayerSpec, parent: ModelSpec, hidden: int, mine: tuple[float, float], state: tuple[bool, bool], fit: Fit
) -> Work:
    """What is tried at one layer that is new, or behind one, and its own pass."""
    (new, drifted), text, (attends, feeds) = state, fit.text, mine
    attention, ffn = layer.attention, layer.ffn
    heads = attention.heads * attention.head_dim if attention is not None else 0
    width = ffn.width if ffn is not None and ffn.as_family else 0
    lost = len(layer.parents) == 1 and attention != parent.layers[layer.parents[0]].attention
    found = Work(layers=text.tokens * (attends + feeds), moved=(attends + feeds) / 2)
    if fit.align and drifted and attention is not None:
        found += _aligned(heads + attention.kv_width, hidden, text)
    if fit.join and new and heads and width and not lost:
        features = heads + hidden * len(layer.parents)
        found += regression_work(features, hidden, text, 2)
        found += Work(layers=text.tokens * (feeds + 2 * heads * hidden), sums=2.0 * text.tokens * width * hidden)
    elif new and heads and lost:
        found += regression_work(heads, hidden, text, fit.ridges) + Work(layers=2 * text.tokens * attends)
    if fit.align and width:
        others = len(layer.parents) if drifted else len(layer.parents) - 1
        for _ in range(others):
            found += _aligned(2 * width // len(layer.parents), hidden, text)
    if new:
        found += regression_work(width or heads, hidden, text, fit.ridges)
        found += Work(layers=text.tokens * (feeds or attends))
    return found


def _aligned(rows: int, hidden: int, text: Text) -> Work:
    """A map of the model's width, fitted and folded into so many rows that read."""
    return regression_work(hidden, hidden, text, 1) + Work(wide=2.0 * rows * hidden**2)
