"""What closed-form fits take in memory, from shapes alone: for the plan, which is read before hours of work.

F features of a fit (the width of an FFN, or heads * head width), O what it gives (the model width D), T tokens of the
calibration text, B of them in a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmsurgeon.model.parts import FFFSpec
from llmsurgeon.model.spec import LayerSpec, ModelSpec

FLOAT = 4
BATCH = 8  # sequences that go through a layer together


@dataclass(frozen=True)
class Text:
    """The text that is fitted on: tokens in all and in a sequence, the bytes of one number of a hidden state, and the
    share of the tokens that judge."""

    tokens: int
    sequence_length: int
    itemsize: int
    held_out: float = 0.0

    @property
    def judging(self) -> int:
        """Tokens that judge and fit nothing."""
        return round(self.held_out * self.tokens)

    @property
    def batch(self) -> int:
        """Tokens that go through a layer together."""
        return min(self.tokens, BATCH * self.sequence_length)


def fits_in_dual(tokens: int, features: int) -> bool:
    """Whether a regression keeps the tokens that fit, and not their Gram matrix: it and the tokens are then smaller."""
    return 5 * tokens <= 3 * features


def judges_as_rows(tokens: int, features: int) -> bool:
    """Whether a regression keeps the tokens that judge, and not their Gram matrix."""
    return tokens <= features


def regression_bytes(features: int, outputs: int, text: Text) -> int:
    """What one ridge regression keeps of the tokens that fit and of those that judge, and solves with.

    The tokens themselves, in the dual with a matrix of their number squared, or Gram matrices F^2; what is missing, or
    its sums; beside them the best update, the one being tried, and half a solution.
    """
    fitting, judging = text.tokens - text.judging, text.judging
    of_rows, of_sums = features * text.itemsize + outputs * FLOAT, FLOAT * features * (features + outputs)
    found = 3 * FLOAT * features * outputs
    found += fitting * of_rows + FLOAT * fitting**2 if fits_in_dual(fitting, features) else of_sums
    return found + (judging * of_rows if judges_as_rows(judging, features) else of_sums)


def refit_bytes(parent: ModelSpec, student: ModelSpec, text: Text) -> int:
    """About the most that a refit of the layers that differ from the parent's takes beside the process itself."""
    starts = [min(layer.parents) for layer in student.layers]
    ends = [*starts[1:], len(parent.layers)]
    found = 0
    for layer, start, end in zip(student.layers, [0, *starts[1:]], ends, strict=True):
        if end - start != 1 or not same_as_before(layer, parent):
            # Parent and student, what is between a layer's attention and FFN, and what each layer of the span read.
            streams = (4 + end - start) * text.tokens * student.hidden * text.itemsize
            found = max(found, streams + _layer_bytes(layer, student.hidden, text))
    return found


def same_as_before(layer: LayerSpec, parent: ModelSpec) -> bool:
    """Whether a layer is described as the parent's that it begins with."""
    before = parent.layers[min(layer.parents)]
    return not layer.branches and (layer.attention, layer.ffn) == (before.attention, before.ffn)


def _layer_bytes(layer: LayerSpec, hidden: int, text: Text) -> int:
    attention, ffn = layer.attention, layer.ffn
    heads = attention.heads * attention.head_dim if attention is not None else hidden
    joined = heads + hidden * len(layer.parents) if attention is not None and ffn is not None else heads
    sums = [regression_bytes(joined, hidden, text)]
    width = 0
    if isinstance(ffn, FFFSpec):
        # What its neurons read and what is missing, of all tokens, gathered and joined; sums of every leaf.
        width, leaves = ffn.active, 2**ffn.depth
        each = ffn.shared**2 + ffn.shared * ffn.leaf_width + ffn.leaf_width**2 + ffn.active * hidden
        of_leaves = FLOAT * leaves * each if ffn.form == "leaf" else regression_bytes(ffn.width, hidden, text)
        sums.append(2 * text.tokens * hidden * (FLOAT + text.itemsize) + of_leaves)
    elif ffn is not None:
        width = ffn.width
        sums.append(regression_bytes(ffn.width, hidden, text))
    # Weights as they are loaded and as they are moved; what a batch is inside the FFN, in float32 where it is summed.
    weights = 2 * 3 * width * hidden * text.itemsize
    inside = text.batch * width * (3 * text.itemsize + FLOAT)
    return max(sums) + weights + inside


def ternary_bytes(inputs: int, outputs: int, text: Text, hidden: int) -> int:
    """About the most that ternary codes take that compensate: a linear of `inputs`, aligned to give `outputs`.

    The Gram matrix of what fits, the same in another order, and four of its size for the factor of its inverse (torch
    copies what it factors); the one of what judges is gone by then.
    """
    streams = 5 * text.tokens * hidden * text.itemsize
    return streams + FLOAT * (6 * inputs**2 + 4 * inputs * outputs) + text.batch * inputs * FLOAT
