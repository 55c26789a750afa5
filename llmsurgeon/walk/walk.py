"""The layer-major traversal: load a layer's weights once, run every stream through it, free it, go on.

A stream is the hidden state of a whole calibration batch under some variant of the model. Measuring and refitting
share this walk, so the weights cost the memory of one layer, whatever the size of the model.

Shapes: S sequences, T tokens each, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from llmsurgeon.walk.runner import LayerRunner
from llmsurgeon.walk.streams import Streams
from llmsurgeon.walk.variants import Variant


@dataclass
class Parts:
    """What one layer did to a few sequences [s, T, D]; a contribution is None where the part is absent."""

    entered: Tensor
    attention: Tensor | None
    ffn_input: Tensor
    ffn: Tensor | None
    left: Tensor

    @property
    def attended(self) -> Tensor:
        """The stream behind the layer's attention."""
        return self.entered if self.attention is None else self.entered + self.attention


def through(runner: LayerRunner, index: int, hidden: Tensor) -> Parts:
    """What the loaded layer `index` does to a few sequences [s, T, D], part by part."""
    attention = runner.attend(index, hidden)
    attended = hidden if attention is None else hidden + attention
    ffn_input = hidden if runner.parallel_residual else attended
    ffn = runner.feed_forward(index, ffn_input)
    return Parts(hidden, attention, ffn_input, ffn, attended if ffn is None else attended + ffn)


Observer = Callable[[int, slice, int, Parts, Parts], None]


@dataclass(frozen=True)
class Course:
    """How a walk goes, where it is not from the first sequence to the last with nobody told.

    rows: how many sequences each variant runs on (the first ones); all by default.
    side_by_side: how many of those that go through a layer together are of one variant, all by default; a divisor of
        every count in `rows`.
    enter: called with each layer's index and module once its weights are there.
    progress: called with the number of layer evaluations done, in tokens.
    """

    rows: Sequence[int] | None = None
    side_by_side: int | None = None
    enter: Callable[[int, nn.Module], None] = lambda index, module: None
    progress: Callable[[int], None] = lambda evaluations: None


@dataclass
class _Lane:
    """A variant on its way: the layer at which it parts from variant 0, and how many sequences it runs on.

    hidden, anchor: [S, T, D], what left the last layer and what the FFNs of the open run read; an anchor is there only
    where the variant has runs.
    """

    variant: Variant
    start: int
    rows: int
    hidden: Tensor
    anchor: Tensor | None


def walk(
    runner: LayerRunner,
    tokens: Tensor,
    variants: Sequence[Variant],
    observe: Observer | None = None,
    *,
    batch: int = 4,
    course: Course = Course(),
) -> Tensor:
    """Run all variants through the model, each layer's weights loaded once.

    A variant shares the stream of `variants[0]` up to its first difference, so removing each of N layers in turn costs
    N(N+1)/2 layer evaluations instead of N^2.

    Args:
        tokens: [S, T].
        observe: called as observe(layer, sequences, variant, parts, parts of variant 0), for variant 0 last.
        batch: sequences that go through a layer together, of one variant or of several.

    Returns:
        What leaves the last layer, [variants, S, T, D] on the CPU; rows beyond a variant's own are undefined.
    """
    size, layers = course.side_by_side or batch, len(runner.layers)
    parts = [slice(start, min(start + size, len(tokens))) for start in range(0, len(tokens), size)]
    streams, lanes = _set_out(runner, tokens, variants, parts, course.rows)
    with torch.no_grad():
        for index in range(layers):
            with runner.loaded(index) as layer:
                course.enter(index, layer)
                for sequences in parts:
                    for place, mine, base in _advance(runner, index, lanes, sequences, batch):
                        course.progress(base.left[..., 0].numel())
                        if observe:
                            observe(index, sequences, place, mine, base)
                        lanes[place].hidden[sequences] = mine.left.cpu()
    for lane in lanes:
        if lane.start == layers:
            lane.hidden[: lane.rows] = streams[0, : lane.rows]
    return streams


def _set_out(
    runner: LayerRunner, tokens: Tensor, variants: Sequence[Variant], parts: list[slice], rows: Sequence[int] | None
) -> tuple[Tensor, list[_Lane]]:
    """Streams [variants, S, T, D] and a lane for each; variant 0's holds what enters the first layer."""
    layers, counts = len(runner.layers), rows or [len(tokens)] * len(variants)
    first = runner.embed(tokens[parts[0]])
    anchored = [place for place, variant in enumerate(variants) if variant.runs]
    both = Streams(len(variants) + len(anchored), (*tokens.shape, first.shape[-1]), first.dtype).data
    streams, anchors = both[: len(variants)], dict(zip(anchored, both[len(variants) :], strict=True))
    for sequences in parts:
        streams[0, sequences] = runner.embed(tokens[sequences]).cpu()
    lanes = []
    for place, (variant, count) in enumerate(zip(variants, counts, strict=True)):
        start = variant.first_difference(variants[0], layers) if place else 0
        lanes.append(_Lane(variant, start, count, streams[place], anchors.get(place)))
    return streams, lanes


def _advance(
    runner: LayerRunner, index: int, lanes: Sequence[_Lane], sequences: slice, batch: int
) -> Iterator[tuple[int, Parts, Parts]]:
    """The loaded layer on a few sequences, for the lanes that have parted from lane 0, and for lane 0 last.

    Gives each lane's number, what the layer did in it, and what it did in lane 0.
    """
    [base] = _together(runner, index, [_step(runner, index, lanes[0], sequences)])
    active = [v for v, lane in enumerate(lanes) if v and lane.start <= index and sequences.start < lane.rows]
    for lane in lanes[1:]:
        if lane.start > index and lane.variant.run_start(index) == index:
            # It has not parted yet, but it will within this run.
            lane.anchor[sequences] = base.ffn_input.cpu()  # type: ignore[index]
    together = max(1, batch // len(base.left))
    for first in range(0, len(active), together):
        group = active[first : first + together]
        steps = [
            _step(runner, index, lanes[v], sequences, known=base if lanes[v].start == index else None) for v in group
        ]
        for v, mine in zip(group, _together(runner, index, steps), strict=True):
            yield v, mine, base
    yield 0, base, base


# Asks for a part's contribution to a hidden state, is sent it, and returns what the layer did.
_Step = Generator[tuple[Literal["attention", "ffn"], Tensor], Tensor | None, Parts]


def _step(runner: LayerRunner, index: int, lane: _Lane, sequences: slice, known: Parts | None = None) -> _Step:
    """One layer on a few sequences. `known` are lane 0's parts where both entered with the same hidden state."""
    variant = lane.variant
    entered = lane.hidden[sequences].to(runner.device) if known is None else known.entered
    # A layer that loses both parts goes whole, norms included.
    gone = index in variant.no_attention and index in variant.no_ffn
    if index in variant.no_attention:
        attention = None if gone else runner.instead(index, "attention", entered)
    elif known is not None and known.attention is not None:
        attention = known.attention
    else:
        attention = yield "attention", entered
    attended = entered if attention is None else entered + attention
    run_start = variant.run_start(index)
    ffn_input = entered if runner.parallel_residual else attended
    if run_start is not None and lane.anchor is not None:
        if run_start == index:
            lane.anchor[sequences] = ffn_input.cpu()
        else:
            ffn_input = lane.anchor[sequences].to(runner.device)
    if index in variant.no_ffn:
        ffn = None if gone else runner.instead(index, "ffn", ffn_input)
    elif known is not None and ffn_input is known.ffn_input and known.ffn is not None:
        ffn = known.ffn
    else:
        ffn = yield "ffn", ffn_input
    left = attended if ffn is None else attended + ffn
    return Parts(entered, attention, ffn_input, ffn, left)


def _together(runner: LayerRunner, index: int, steps: Sequence[_Step]) -> list[Parts]:
    """Carry out some steps; what they ask for is computed for all of them at once, as small batches are slow."""
    asked: dict[int, tuple[str, Tensor]] = {}
    done: dict[int, Parts] = {}

    def proceed(place: int, answer: Tensor | None) -> None:
        try:
            asked[place] = steps[place].send(answer)
        except StopIteration as end:
            done[place] = end.value

    for place in range(len(steps)):
        proceed(place, None)
    for part, compute in (("attention", runner.attend), ("ffn", runner.feed_forward)):
        places = [place for place in asked if asked[place][0] == part]
        if not places:
            continue
        hidden = [asked.pop(place)[1] for place in places]
        contribution = compute(index, hidden[0] if len(hidden) == 1 else torch.cat(hidden))
        answers = [None] * len(places) if contribution is None else contribution.split(len(hidden[0]))
        for place, answer in zip(places, answers, strict=True):
            proceed(place, answer)
    return [done[place] for place in range(len(steps))]
