"""The layer-major traversal: load a layer's weights once, run every stream through it, free it, go on.

A stream is the hidden state of a whole calibration batch under some variant of the model. Measuring and refitting
share this walk, so the weights cost the memory of one layer, whatever the size of the model.

Shapes: S sequences, T tokens each, D model width, V vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmsurgeon.families import family_of
from llmsurgeon.formats.models import empty_model

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

    def _at(self, layer: int) -> tuple[bool, bool, int | None]:
        # A run's first layer counts: what its FFN reads has to be kept.
        return layer in self.no_attention, layer in self.no_ffn, self.run_start(layer)


@dataclass
class Parts:
    """What one layer did to a few sequences [s, T, D]; a contribution is None where the part is absent."""

    entered: Tensor
    attention: Tensor | None
    ffn_input: Tensor
    ffn: Tensor | None
    left: Tensor


class _Catcher(nn.Module):
    """Stands in for a layer: keeps how the model calls it and passes the hidden state on."""

    def __init__(self) -> None:
        super().__init__()
        self.call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self.hidden: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.call, self.hidden = (args, kwargs), hidden_states
        return hidden_states


class LayerRunner:
    """A model whose layers are filled with weights one at a time.

    Args:
        config: normalised config.json, of a stock or a converted model.
        weights: canonical names -> tensors; a layer's tensors are read when the layer is entered.
    """

    def __init__(
        self, config: Mapping[str, Any], weights: Mapping[str, Tensor], dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        self.family = family_of(config)
        self.weights, self.dtype, self.device = weights, dtype, device
        self.parallel_residual = self.family.parallel_residual(config)
        self.model = empty_model(config)
        self.layers = list(self.model.get_submodule(self.family.layers))
        outside = {
            name: weights[name].to(device=device, dtype=dtype)
            for name in weights
            if not name.startswith(f"{self.family.layers}.")
        }
        self.model.load_state_dict(outside, strict=False, assign=True)
        self.model.tie_weights()
        holder, _, attribute = self.family.layers.rpartition(".")
        self.base = self.model.get_submodule(holder)
        self.catchers = nn.ModuleList(_Catcher() for _ in self.layers)
        setattr(self.base, attribute, self.catchers)
        for buffer_owner in self.base.modules():
            for name, buffer in buffer_owner.named_buffers(recurse=False):
                setattr(buffer_owner, name, buffer.to(device))
        self._calls: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}

    def embed(self, tokens: Tensor) -> Tensor:
        """What enters the first layer, [s, T] -> [s, T, D]; also learns how the model calls each layer."""
        with torch.no_grad():
            self.base(input_ids=tokens.to(self.device), use_cache=False)
        catchers: list[_Catcher] = list(self.catchers)  # type: ignore[arg-type]
        self._calls[len(tokens)] = [catcher.call for catcher in catchers]
        hidden = catchers[0].hidden
        assert hidden is not None
        for catcher in catchers:
            catcher.hidden = None
        return hidden

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

    def attend(self, index: int, hidden: Tensor) -> Tensor | None:
        """Attention's contribution at the loaded layer, [s, T, D] -> [s, T, D]; None where there is none."""
        layer, family = self.layers[index], self.family
        attention = getattr(layer, family.attention, None)
        if attention is None:
            return None
        args, kwargs = self._calls[len(hidden)][index]
        contribution: Tensor = attention(getattr(layer, family.attention_norm)(hidden), *args, **kwargs)[0]
        return contribution

    def feed_forward(self, index: int, hidden: Tensor) -> Tensor | None:
        """The FFN's contribution at the loaded layer, norm included; None where there is none.

        A parallel block's contribution, its attentions included, counts as its FFN's: all of it reads one input.
        """
        layer, family = self.layers[index], self.family
        if hasattr(layer, "branches"):
            return self.whole(index, hidden) - hidden
        ffn = getattr(layer, family.ffn, None)
        if ffn is None:
            return None
        contribution: Tensor = ffn(getattr(layer, family.ffn_norm)(hidden))
        return contribution

    def whole(self, index: int, hidden: Tensor) -> Tensor:
        """The loaded layer as the model itself runs it."""
        args, kwargs = self._calls[len(hidden)][index]
        output: Tensor = self.layers[index](hidden, *args, **kwargs)
        return output

    def final(self, hidden: Tensor) -> Tensor:
        """Final norm and head: [..., D] -> logits [..., V]."""
        norm = self.model.get_submodule(self.family.final_norm)
        logits: Tensor = self.model.get_output_embeddings()(norm(hidden))
        return logits


class Streams:
    """Hidden states [S, T, D] of several variants; kept in a temporary file when memory would not hold them."""

    def __init__(self, count: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        size = count * torch.Size(shape).numel() * dtype.itemsize
        self._file = None
        if size > STREAM_BYTES_IN_MEMORY:
            self._file = tempfile.NamedTemporaryFile(prefix="llmsurgeon-streams-")  # noqa: SIM115
            self._file.truncate(size)
            numbers = size // dtype.itemsize
            self.data = torch.from_file(self._file.name, shared=True, size=numbers, dtype=dtype).view(count, *shape)
        else:
            self.data = torch.empty((count, *shape), dtype=dtype)


Observer = Callable[[int, slice, int, Parts, Parts], None]


def walk(
    runner: LayerRunner,
    tokens: Tensor,
    variants: Sequence[Variant],
    observe: Observer | None = None,
    *,
    batch: int = 4,
    rows: Sequence[int] | None = None,
    enter: Callable[[int, nn.Module], None] | None = None,
    progress: Callable[[int], None] = lambda evaluations: None,
) -> Tensor:
    """Run all variants through the model, each layer's weights loaded once.

    A variant shares the stream of `variants[0]` up to its first difference, so removing each of N blocks in turn costs
    N(N+1)/2 block evaluations instead of N^2.

    Args:
        tokens: [S, T].
        observe: called as observe(layer, sequences, variant, parts, parts of variant 0).
        rows: how many sequences each variant runs on (the first ones); all by default.
        enter: called with each layer's index and module once its weights are there.
        progress: called with the number of layer evaluations done, in tokens.

    Returns:
        What leaves the last layer, [variants, S, T, D] on the CPU; rows beyond a variant's own are undefined.
    """
    layers, base = len(runner.layers), variants[0]
    counts = list(rows or [len(tokens)] * len(variants))
    starts = [0, *(variant.first_difference(base, layers) for variant in variants[1:])]
    slices = [slice(start, min(start + batch, len(tokens))) for start in range(0, len(tokens), batch)]
    first = runner.embed(tokens[slices[0]])
    streams = Streams(len(variants), (*tokens.shape, first.shape[-1]), first.dtype).data
    # What the FFNs of an open run read; allocated only for variants that have runs.
    anchors = {
        v: Streams(1, tuple(streams.shape[1:]), first.dtype).data[0] for v in range(len(variants)) if variants[v].runs
    }
    for part in slices:
        streams[0, part] = runner.embed(tokens[part]).cpu()
    with torch.no_grad():
        for index in range(layers):
            with runner.loaded(index) as layer:
                if enter:
                    enter(index, layer)
                for variant, start in enumerate(starts):
                    if start == index and variant:
                        streams[variant] = streams[0]
                        if variants[variant].run_start(index) not in (None, index):
                            # It only differs inside a run that variant 0 began too: what the run reads is variant 0's.
                            anchors[variant].copy_(anchors[0])
                for part in slices:
                    base_parts = _step(runner, index, base, streams[0], anchors.get(0), part, None)
                    progress(base_parts.left[..., 0].numel())
                    for variant, start in enumerate(starts):
                        if not variant or start > index or part.start >= counts[variant]:
                            continue
                        known = base_parts if start == index else None
                        mine = _step(
                            runner, index, variants[variant], streams[variant], anchors.get(variant), part, known
                        )
                        progress(mine.left[..., 0].numel())
                        if observe:
                            observe(index, part, variant, mine, base_parts)
                        streams[variant, part] = mine.left.cpu()
                    if observe:
                        observe(index, part, 0, base_parts, base_parts)
                    streams[0, part] = base_parts.left.cpu()
    for variant, start in enumerate(starts):
        if start == layers and variant:
            streams[variant] = streams[0]
    return streams


def _step(
    runner: LayerRunner,
    index: int,
    variant: Variant,
    stream: Tensor,
    anchor: Tensor | None,
    part: slice,
    known: Parts | None,
) -> Parts:
    """One layer on a few sequences. `known` are variant 0's parts where both entered with the same hidden state."""
    entered = stream[part].to(runner.device) if known is None else known.entered
    attention = None
    if index not in variant.no_attention:
        same = known is not None and known.attention is not None
        attention = known.attention if same and known is not None else runner.attend(index, entered)
    attended = entered if attention is None else entered + attention
    run_start = variant.run_start(index)
    ffn_input = entered if runner.parallel_residual else attended
    if run_start is not None and anchor is not None:
        if run_start == index:
            anchor[part] = ffn_input.cpu()
        else:
            ffn_input = anchor[part].to(runner.device)
    ffn = None if index in variant.no_ffn else runner.feed_forward(index, ffn_input)
    left = attended if ffn is None else attended + ffn
    return Parts(entered, attention, ffn_input, ffn, left)
