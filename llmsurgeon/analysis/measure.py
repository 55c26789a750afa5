"""What can go: every score of the analysis, from as few passes over the layers as possible.

Shapes: N layers, S sequences, T tokens, D model width, H FFN width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmsurgeon.analysis.divergence import divergences
from llmsurgeon.analysis.score import Scene, Score
from llmsurgeon.analysis.similarity import angular_distance, cosine
from llmsurgeon.evaluation.perplexity import mean_interval
from llmsurgeon.processes.share import Share
from llmsurgeon.progress import Progress
from llmsurgeon.walk.runner import LayerRunner
from llmsurgeon.walk.variants import Variant
from llmsurgeon.walk.walk import Course, Parts, walk

# One sequence in so many is enough to remove single attentions and FFNs on; whole layers on BLOCK_TIMES as many.
SUBLAYER_SHARE, BLOCK_TIMES = 8, 4


@dataclass
class LayerScore:
    """One number per layer with its 95 % interval over sequences (NaN where the layer has no such part)."""

    mean: list[float]
    low: list[float]
    high: list[float]

    @classmethod
    def of(cls, values_NS: Tensor) -> LayerScore:
        """From per-layer, per-sequence values."""
        mean = values_NS.double().mean(1).tolist()
        bounds = [mean_interval(row) or (float("nan"), float("nan")) for row in values_NS]
        return cls(mean, [b[0] for b in bounds], [b[1] for b in bounds])


@dataclass
class Measurements:
    """The scores by name. Arrays are indexed by layer.

    block_dependency, ffn_dependency: M [N, N], M[i, j] = mean over tokens of 1 - cos(h_j, h_j without i)
        for j > i (FFN Fusion, arXiv 2503.18908, section 3); NaN elsewhere.
    angular_distance: [N, N]; row n - 1, column l: distance over the last token between the inputs of layers l and
        l + n (arXiv 2403.17887, eq. 2); NaN where l + n is beyond the model.
    ffn_channel: [N, H] mean |activation| * ||down column||.
    scores: attention_similarity, ffn_similarity (LLM-Drop, arXiv 2406.15786), block_influence (ShortGPT,
        arXiv 2403.03853), attention_kl, ffn_kl, block_kl (KL to the parent when it is removed; Puzzle,
        arXiv 2411.19146).
    """

    scores: dict[str, LayerScore] = field(default_factory=dict)
    arrays: dict[str, Tensor] = field(default_factory=dict)

    def for_recipes(self) -> dict[str, Any]:
        """What operations look up: name -> list or tensor indexed by layer."""
        return {**{name: score.mean for name, score in self.scores.items()}, **self.arrays}


def parts_removed(spec_layers: int, part: str) -> list[Variant]:
    """One variant per layer with its attention, its FFN or both removed."""
    return [
        Variant(
            no_attention=frozenset({layer} if part != "ffn" else ()),
            no_ffn=frozenset({layer} if part != "attention" else ()),
        )
        for layer in range(spec_layers)
    ]


def measure(runner: LayerRunner, tokens: Tensor, batch: int = 4) -> Measurements:
    """All scores of the unchanged model, in one walk.

    Similarities use all sequences; what is removed in turn, which is dear, fewer: see `sequences_for`.

    Args:
        tokens: [S, T].
    """
    layers, sequences = len(runner.layers), len(tokens)
    blocks, few = sequences_for(sequences, batch)
    groups = {"block": blocks, "attention": few, "ffn": few}
    share = Share.of(sequences)
    tokens = share.mine(tokens)
    variants = [Variant()]
    rows = [len(tokens)]
    for part, count in groups.items():
        variants += parts_removed(layers, part)
        rows += [share.of_first(count)] * layers
    observer = _Observer(layers, tokens, runner, share)
    work = evaluations(layers, rows) * tokens.shape[1]
    with Progress("measure dependencies and scores", work, "token-layers") as progress:
        course = Course(rows, side_by_side(rows, batch), observer.enter, progress.advance)
        streams = walk(runner, tokens, variants, observer, batch=batch, course=course)
    result = Measurements(arrays=observer.arrays(), scores=observer.scores())
    divergence = share.every(divergences(runner, streams, rows), dim=1)
    for place, (part, count) in enumerate(groups.items()):
        own = slice(1 + place * layers, 1 + (place + 1) * layers)
        result.scores[f"{part}_kl"] = LayerScore.of(divergence[own, :count])
    return result


def sequences_for(sequences: int, batch: int = 4) -> tuple[int, int]:
    """On how many of `sequences` layers are removed (half of them, all of eight) and single parts (an eighth, but two).

    A variant's mean over some thousand tokens is sure enough to rank layers, and N(N + 1) / 2 evaluations a sequence
    are what the analysis costs. The second number is at most `batch` or a multiple of it, and divides the first,
    unless there are too few sequences for that.
    """
    few = max(min(2, sequences), sequences // SUBLAYER_SHARE)
    few -= few % batch if few > batch else 0
    return min(sequences, BLOCK_TIMES * few), few


def side_by_side(rows: Sequence[int], batch: int) -> int:
    """How many sequences of a variant go together: at most `batch`, and a divisor of each of `rows` but those that are
    all sequences, the first."""
    partial = math.gcd(*(count for count in rows if count != rows[0]))
    return max(size for size in range(1, batch + 1) if partial % size == 0)


def evaluations(layers: int, rows: Sequence[int]) -> int:
    """Sequence-layer evaluations of a walk that removes each layer in turn for every group of `layers` variants."""
    return rows[0] * layers + sum(count * (layers - place % layers) for place, count in enumerate(rows[1:]))


def mean_or_nan(sums: Tensor, counts: Tensor) -> Tensor:
    return torch.where(counts > 0, sums / counts.clamp_min(1), torch.nan).float()


class _Observer:
    """Accumulates what `measure` needs while the walk passes."""

    def __init__(self, layers: int, tokens: Tensor, runner: LayerRunner, share: Share) -> None:
        self.layers, self.runner, self.share = layers, runner, share
        sequences = len(tokens)
        nan = float("nan")
        self.attention = torch.full((layers, sequences), nan)
        self.ffn = torch.full((layers, sequences), nan)
        self.influence = torch.full((layers, sequences), nan)
        self.last = torch.zeros(layers + 1, sequences, 0)
        self.dependency = torch.zeros(layers, layers, dtype=torch.float64)
        self.counts = torch.zeros(layers, layers)
        self.channels: list[Tensor] = []
        self._activation: Tensor | None = None
        self._hook: Any = None
        self._expected = True
        self._tokens = share.total * tokens.shape[1]

    def enter(self, layer: int, module: Any) -> None:
        """A new layer's weights are there: watch what enters its FFN's output projection."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        family = self.runner.family
        trees = self.runner.entries[layer]["ffn"].get("kind") == "fff"
        if not self.runner.feeds_forward(layer) or family.experts or trees:
            self.channels.append(torch.zeros(0))
            return
        projection = module.get_submodule(family.ffn_module(family.ffn_out))
        weight = projection.weight.T if family.transposed else projection.weight
        self._norms = weight.detach().float().norm(dim=0).cpu()
        self.channels.append(torch.zeros(len(self._norms)))
        self._expected = True

        def hook(_: Any, inputs: tuple[Tensor, ...]) -> None:
            # Variant 0 runs first on every batch: only its activations count.
            if self._expected:
                self._expected = False
                activation = inputs[0].detach().float().abs()
                self._activation = activation.flatten(0, -2).sum(0).cpu()

        self._hook = projection.register_forward_pre_hook(hook)

    def __call__(self, layer: int, part: slice, variant: int, mine: Parts, parent: Parts) -> None:
        if variant == 0:
            self._parent(layer, part, parent)
        elif variant <= self.layers and variant - 1 < layer:
            distance = 1 - cosine(mine.left - mine.entered, parent.left - parent.entered)
            self.dependency[variant - 1, layer] += distance.sum().item()
            self.counts[variant - 1, layer] += distance.numel()

    def _parent(self, layer: int, part: slice, parts: Parts) -> None:
        if parts.attention is not None:
            self.attention[layer, part] = cosine(parts.entered, parts.entered + parts.attention).mean(-1).cpu()
        if parts.ffn is not None:
            self.ffn[layer, part] = cosine(parts.ffn_input, parts.ffn_input + parts.ffn).mean(-1).cpu()
        self.influence[layer, part] = 1 - cosine(parts.entered, parts.left).mean(-1).cpu()
        if not self.last.shape[-1]:
            self.last = torch.zeros(self.layers + 1, self.last.shape[1], parts.left.shape[-1])
        self.last[layer, part] = parts.entered[:, -1].float().cpu()
        self.last[layer + 1, part] = parts.left[:, -1].float().cpu()
        if self._activation is not None and len(self.channels[layer]):
            self.channels[layer] += self._activation * self._norms
            self._activation = None
        self._expected = True

    def scores(self) -> dict[str, LayerScore]:
        """Similarities and block influence."""
        return {
            "attention_similarity": LayerScore.of(self.share.every(self.attention, dim=1)),
            "ffn_similarity": LayerScore.of(self.share.every(self.ffn, dim=1)),
            "block_influence": LayerScore.of(self.share.every(self.influence, dim=1)),
        }

    def arrays(self) -> dict[str, Tensor]:
        """Dependency matrix, angular distances, channel scores."""
        layers = self.layers
        self.share.add_up(self.dependency, self.counts, *self.channels)
        last = self.share.every(self.last, dim=1)
        distances = torch.full((layers, layers), float("nan"))
        for size in range(1, layers + 1):
            for start in range(layers - size + 1):
                distances[size - 1, start] = angular_distance(last[start], last[start + size]).mean()
        arrays = {"block_dependency": mean_or_nan(self.dependency, self.counts), "angular_distance": distances}
        widths = {len(channel) for channel in self.channels}
        if len(widths) == 1 and widths != {0}:
            arrays["ffn_channel"] = torch.stack(self.channels) / self._tokens
        return arrays


def _measured(scene: Scene, requests: Sequence[Any]) -> Mapping[str, Any]:
    return measure(scene.runner, scene.tokens, scene.batch).for_recipes()


MEASURED = Score(_measured, tokens=8192)
