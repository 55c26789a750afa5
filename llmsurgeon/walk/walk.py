"""The layer-major traversal: load a layer's weights once, run every stream through it, free it, go on.

A stream is the hidden state of a whole calibration batch under some variant of the model. Measuring and refitting
share this walk, so the weights cost the memory of one layer, whatever the size of the model.

Shapes: S sequences, T tokens each, D model width, V vocabulary.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmsurgeon.checkpoint.finite import is_finite, not_finite
from llmsurgeon.checkpoint.kept import allocate, writing
from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats.experts import class_form
from llmsurgeon.formats.models import as_surgeon, empty_model
from llmsurgeon.model.families import family_of

# Streams above this many bytes live in a temporary file instead of memory.
STREAM_BYTES_IN_MEMORY = 6 << 30


@dataclass(frozen=True)
class Variant:
    """The parent with parts left out or run in parallel; layers are the parent's.

    runs: layers of one run all feed their FFN with what the run's first FFN reads.
    """

    no_attention: frozenset[int] = frozenset()
    no_ffn: frozenset[int] = frozenset()
    runs: tuple[tuple[int, ...], ...] = ()

    def run_start(self, layer: int) -> int | None:
        """First layer of the run that `layer` belongs to, None outside runs."""
        return next((run[0] for run in self.runs if layer in run), None)

    def first_difference(self, other: Variant, layers: int) -> int:
        """The first layer that the two variants compute differently (`layers` when they are equal)."""
        return next((i for i in range(layers) if self._at(i) != other._at(i)), layers)

    def _at(self, layer: int) -> tuple[bool, bool, int]:
        # A run's first layer computes what it would outside of runs.
        run_start = self.run_start(layer)
        return layer in self.no_attention, layer in self.no_ffn, layer if run_start is None else run_start


@dataclass
class Parts:
    """What one layer did to a few sequences [s, T, D]; a contribution is None where the part is absent."""

    entered: Tensor
    attention: Tensor | None
    ffn_input: Tensor
    ffn: Tensor | None
    left: Tensor


_Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Catcher(nn.Module):
    """Stands in for a layer: keeps how the model calls it and passes the hidden state on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        if hasattr(layer, "attention_type"):  # some models choose the mask by it
            self.attention_type = layer.attention_type
        self.returns_tuple = layer.returns_tuple
        self.call: _Call = ((), {})
        self.hidden: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.call, self.hidden = (args, kwargs), hidden_states
        return (hidden_states, None) if self.returns_tuple else hidden_states


class Given(nn.Module):
    """Stands in for the model's body: the hidden state that it is given is the one it returns."""

    @property
    def decoder(self) -> Given:
        """Itself: some heads call the body's decoder."""
        return self

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions as Output

        # Heads that want a pooled state beside the logits get the first position; what they pass on is not there.
        output = Output(last_hidden_state=inputs_embeds, pooler_output=inputs_embeds[:, 0])
        output.router_logits = None
        return output


class LayerRunner:
    """A model whose layers are filled with weights one at a time.

    Args:
        config: normalised config.json, of a stock or a converted model.
        weights: canonical names -> tensors; a layer's tensors are read when the layer is entered.
        padding: token that fills sequences up to a common length; None where all are of one length. Its places hold
            exact zeros in every stream, by which they are known: see `real`.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: str = "cpu",
        padding: int | None = None,
    ) -> None:
        self.padding = padding
        self.family = family_of(config)
        if config.get("block_transformer"):
            raise SurgeryError(
                "a block transformer is not one stack of layers, and cannot be walked layer by layer; analyse and "
                "refit the model that it is made from, before the block step"
            )
        weights = class_form(weights, self.family)
        self.weights, self.dtype, self.device = weights, dtype, device
        self.parallel_residual = self.family.parallel_residual(config)
        # In the surgeon form each layer answers for its attention and its FFN on their own, whatever the family.
        detailed = as_surgeon(config)
        self.entries: list[dict[str, Any]] = detailed["block_configs"]
        self.model = empty_model(detailed)
        self.layers = list(self.model.get_submodule(self.family.layers))
        # Heads and towers that go along beside the model stay on the disk.
        own = set(self.model.state_dict())
        outside = {
            name: weights[name].to(device=device, dtype=dtype)
            for name in weights
            if name in own and not name.startswith(f"{self.family.layers}.")
        }
        self.model.load_state_dict(outside, strict=False, assign=True)
        self.model.tie_weights()
        self.base = self.model.base_model
        self.catchers = nn.ModuleList(_Catcher(layer) for layer in self.layers)
        self.model.set_submodule(self.family.layers, self.catchers)
        for buffer_owner in self.base.modules():
            for name, buffer in buffer_owner.named_buffers(recurse=False):
                setattr(buffer_owner, name, buffer.to(device))
        self._calls: dict[Any, list[_Call]] = {}
        self._length = 0

    def embed(self, tokens: Tensor) -> Tensor:
        """What enters the first layer, [s, T] -> [s, T, D]; also learns how the model calls each layer."""
        given: dict[str, Any] = {} if self.family.encoder else {"use_cache": False}
        if self.padding is not None:
            given["attention_mask"] = (tokens != self.padding).long().to(self.device)
        with torch.no_grad():
            self.base(input_ids=tokens.to(self.device), **given)
        catchers: list[_Catcher] = list(self.catchers)  # type: ignore[arg-type]
        if tokens.shape[1] != self._length:
            self._calls, self._length = {}, tokens.shape[1]
        hidden = catchers[0].hidden
        assert hidden is not None
        for catcher in catchers:
            catcher.hidden = None
        self._finite("the embedding", (self.family.embedding,), hidden)
        if self.padding is not None:
            hidden = hidden * given["attention_mask"][..., None].to(hidden.dtype)
        self._calls[self._key(hidden)] = [catcher.call for catcher in catchers]
        return hidden

    def real(self, hidden: Tensor) -> Tensor:
        """Which places of a stream [s, T, D] hold tokens and no padding, bool [s, T]."""
        if self.padding is None:
            return torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
        return hidden.any(-1)

    def _finite(self, where: str, prefixes: tuple[str, ...], state: Tensor | None) -> Tensor | None:
        """The state, which must be finite; `prefixes` are those of the weights that made it.

        Raises:
            SurgeryError: NaN or infinity; the message names the place, the dtype and what to do.
        """
        if state is not None and not is_finite(state):
            made = {name: self.weights[name] for name in self.weights if name.startswith(prefixes)}
            raise not_finite(where, self.dtype, made)
        return state

    def _only_real(self, hidden: Tensor, contribution: Tensor | None) -> Tensor | None:
        """A contribution to `hidden`, or what it becomes, with zeros where there is padding."""
        if contribution is None or self.padding is None:
            return contribution
        return contribution * self.real(hidden)[..., None].to(contribution.dtype)

    def _key(self, hidden: Tensor) -> Any:
        """What tells the calls of one batch from another's: how many sequences, or which places are padding."""
        return len(hidden) if self.padding is None else self.real(hidden).cpu().numpy().tobytes()

    def _call(self, index: int, hidden: Tensor) -> _Call:
        if self.padding is None:
            return self.call_of(index, len(hidden))
        key = self._key(hidden)
        if key not in self._calls:
            # Any other token will do: how layers are called depends on lengths alone.
            self.embed(torch.where(self.real(hidden).cpu(), int(self.padding == 0), self.padding))
        return self._calls[key][index]

    def call_of(self, index: int, sequences: int) -> _Call:
        """What layer `index` is called with beside the hidden state of so many sequences, as long as the last ones."""
        if sequences not in self._calls:
            self.embed(torch.zeros(sequences, self._length, dtype=torch.long))
        return self._calls[sequences][index]

    @contextmanager
    def loaded(self, index: int) -> Iterator[nn.Module]:
        """Layer `index` with its weights, which leave memory again at the end."""
        layer = self.layers[index]
        prefix = self.family.layer(index)
        state = {
            name: self.weights[prefix + name].to(device=self.device, dtype=self.dtype) for name in layer.state_dict()
        }
        layer.load_state_dict(state, assign=True)
        try:
            yield layer
        finally:
            layer.to("meta")

    def attends(self, index: int) -> bool:
        """True where layer `index` has an attention, its own and not a parallel branch's."""
        return not self.entries[index].get("parallel") and not self.entries[index]["attention"]["no_op"]

    def feeds_forward(self, index: int) -> bool:
        """True where layer `index` has an FFN of its own."""
        return not self.entries[index].get("parallel") and not self.entries[index]["ffn"]["no_op"]

    def attend(self, index: int, hidden: Tensor) -> Tensor | None:
        """Attention's contribution at the loaded layer, [s, T, D] -> [s, T, D]; None where there is none."""
        layer = self.layers[index]
        if hasattr(layer, "branches"):
            return None
        args, kwargs = self._call(index, hidden)
        made = self._only_real(hidden, layer.attend(hidden, *args, **kwargs))
        return self._finite(f"layer {index}, attention", (self.family.layer(index),), made)

    def feed_forward(self, index: int, hidden: Tensor) -> Tensor | None:
        """The FFN's contribution at the loaded layer, norm included; None where there is none.

        A parallel block's contribution, its attentions included, counts as its FFN's: all of it reads one input.
        """
        layer = self.layers[index]
        if hasattr(layer, "branches"):
            return self.whole(index, hidden) - hidden
        made = self._only_real(hidden, layer.feed_forward(hidden))
        return self._finite(f"layer {index}, FFN", (self.family.layer(index),), made)

    def instead(self, index: int, part: Literal["attention", "ffn"], hidden: Tensor) -> Tensor | None:
        """What the loaded layer would contribute in place of a part that goes: LN(x) - x where the norm stays."""
        if not self.family.post_norm:
            return None
        norm = self.family.attention_norm if part == "attention" else self.family.ffn_norm
        return self._only_real(hidden, self.layers[index].get_submodule(norm)(hidden) - hidden)

    def whole(self, index: int, hidden: Tensor) -> Tensor:
        """The loaded layer as the model itself runs it."""
        args, kwargs = self._call(index, hidden)
        output: Any = self.layers[index](hidden, *args, **kwargs)
        stream = self._only_real(hidden, output[0] if self.layers[index].returns_tuple else output)
        stream = self._finite(f"layer {index}", (self.family.layer(index),), stream)
        assert stream is not None
        return stream

    def states(self, hidden: Tensor) -> Tensor:
        """The model's last hidden state from what left the last layer: the final norm, where there is one."""
        states = hidden
        if self.family.final_norm:
            states = self.model.get_submodule(self.family.final_norm)(states)
        holder, _, name = self.family.final_projection.rpartition(".")
        projection = getattr(self.model.get_submodule(holder), name) if name else None
        made = states if projection is None else projection(states)
        self._finite("the final norm", (f"{self.family.final_norm}.",), made)
        return made

    def final(self, hidden: Tensor) -> Tensor:
        """Final norm and head, as the model's own class computes them: [T, D] -> logits [T, V]."""
        states, body = self.states(hidden)[None], self.model.base_model_prefix
        setattr(self.model, body, Given())
        try:
            output = self.model(inputs_embeds=states)
        finally:
            setattr(self.model, body, self.base)
        logits: Tensor = output["logits" if "logits" in output else "prediction_logits"]
        outside = tuple(name for name in self.model.state_dict() if not name.startswith(f"{self.family.layers}."))
        self._finite("the head", outside, logits)
        return logits[0]


class Streams:
    """Hidden states [S, T, D] of several variants; kept in a temporary file when memory would not hold them."""

    def __init__(self, count: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        size = count * torch.Size(shape).numel() * dtype.itemsize
        if size > STREAM_BYTES_IN_MEMORY:
            then = f"hidden states take {size:,} bytes there: set TMPDIR to a folder with room, or take fewer tokens"
            with writing(Path(tempfile.gettempdir()), then):
                self.data = self._mapped(size, dtype).view(count, *shape)
        else:
            self.data = torch.empty((count, *shape), dtype=dtype)

    def _mapped(self, size: int, dtype: torch.dtype) -> Tensor:
        """A tensor that is a temporary file, all of its room on the disk taken."""
        with tempfile.NamedTemporaryFile(prefix="llmsurgeon-streams-", delete=False) as file:
            try:
                allocate(file.fileno(), size)
                return torch.from_file(file.name, shared=True, size=size // dtype.itemsize, dtype=dtype)
            finally:
                os.unlink(file.name)  # mapped, it needs no name, and a kill leaves none


Observer = Callable[[int, slice, int, Parts, Parts], None]


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
    side_by_side: int | None = None,
    rows: Sequence[int] | None = None,
    enter: Callable[[int, nn.Module], None] | None = None,
    progress: Callable[[int], None] = lambda evaluations: None,
) -> Tensor:
    """Run all variants through the model, each layer's weights loaded once.

    A variant shares the stream of `variants[0]` up to its first difference, so removing each of N blocks in turn costs
    N(N+1)/2 block evaluations instead of N^2.

    Args:
        tokens: [S, T].
        observe: called as observe(layer, sequences, variant, parts, parts of variant 0), for variant 0 last.
        batch: sequences that go through a layer together, of one variant or of several.
        side_by_side: how many of them are of one variant, all by default; a divisor of every count in `rows`.
        rows: how many sequences each variant runs on (the first ones); all by default.
        enter: called with each layer's index and module once its weights are there.
        progress: called with the number of layer evaluations done, in tokens.

    Returns:
        What leaves the last layer, [variants, S, T, D] on the CPU; rows beyond a variant's own are undefined.
    """
    size, layers = side_by_side or batch, len(runner.layers)
    parts = [slice(start, min(start + size, len(tokens))) for start in range(0, len(tokens), size)]
    streams, lanes = _set_out(runner, tokens, variants, parts, rows)
    with torch.no_grad():
        for index in range(layers):
            with runner.loaded(index) as layer:
                if enter:
                    enter(index, layer)
                for sequences in parts:
                    _advance(runner, index, lanes, sequences, batch, observe, progress)
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
    streams = Streams(len(variants), (*tokens.shape, first.shape[-1]), first.dtype).data
    for sequences in parts:
        streams[0, sequences] = runner.embed(tokens[sequences]).cpu()
    lanes = []
    for place, (variant, count) in enumerate(zip(variants, counts, strict=True)):
        start = variant.first_difference(variants[0], layers) if place else 0
        anchor = Streams(1, tuple(streams.shape[1:]), first.dtype).data[0] if variant.runs else None
        lanes.append(_Lane(variant, start, count, streams[place], anchor))
    return streams, lanes


def _advance(
    runner: LayerRunner,
    index: int,
    lanes: Sequence[_Lane],
    sequences: slice,
    batch: int,
    observe: Observer | None,
    progress: Callable[[int], None],
) -> None:
    """The loaded layer on a few sequences, for lane 0 and for the lanes that have parted from it."""
    [base] = _together(runner, index, [_step(runner, index, lanes[0], sequences)])
    evaluations = base.left[..., 0].numel()
    progress(evaluations)
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
            progress(evaluations)
            if observe:
                observe(index, sequences, v, mine, base)
            lanes[v].hidden[sequences] = mine.left.cpu()
    if observe:
        observe(index, sequences, 0, base, base)
    lanes[0].hidden[sequences] = base.left.cpu()


# Asks for a part's contribution to a hidden state, is sent it, and returns what the layer did.
_Step = Generator[tuple[Literal["attention", "ffn"], Tensor], Tensor | None, Parts]


def _step(runner: LayerRunner, index: int, lane: _Lane, sequences: slice, known: Parts | None = None) -> _Step:
    """One layer on a few sequences. `known` are lane 0's parts where both entered with the same hidden state."""
    variant = lane.variant
    entered = lane.hidden[sequences].to(runner.device) if known is None else known.entered
    # A block that loses both parts goes whole, norms included.
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
