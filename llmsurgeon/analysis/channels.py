"""Which channels of an FFN can go, and what each width costs once the others make up for them.

Channels go one after the other, each time those whose loss the others' output rows stand in for best (optimal brain
surgeon on structures: ZipLM, arXiv 2302.04089; OSSCAR, arXiv 2403.12983). The order is nested: one pass over the text
serves every width.

Shapes: n tokens, D model width, H FFN width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmsurgeon.analysis.elimination import eliminate
from llmsurgeon.analysis.score import Scene, Score
from llmsurgeon.analysis.watch import watch
from llmsurgeon.operations.prune_width import Channels
from llmsurgeon.processes.exchange import send
from llmsurgeon.processes.share import Share
from llmsurgeon.walk.runner import LayerRunner
from llmsurgeon.walk.walk import Parts

Behind = Callable[[Parts], Tensor]
Order = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Elimination:
    """order: when each channel goes, [H]; those with the highest numbers stay longest.

    loss: [H + 1]; loss[w] is the error of the w channels that stay longest: mean over tokens of ||change of what the
        FFN adds||^2 / ||stream behind it - its mean||^2, output rows refitted.
    """

    order: Tensor
    loss: Tensor


def eliminate_channels(
    runner: LayerRunner, tokens: Tensor, layers: Collection[int], batch: int = 4
) -> dict[int, Elimination]:
    """Layer -> the order in which its FFN's channels go.

    Memory: two matrices [H, H] in float32 beside the stream.

    Args:
        tokens: [S, T].
    """
    path = runner.family.ffn_module(runner.family.ffn_out)

    def watcher(layer: int, module: nn.Module) -> ReadBy:
        return ReadBy(runner, module.get_submodule(path), lambda parts: parts.left)

    return watch(runner, tokens, watcher, layers, "order FFN channels", batch)


class ReadBy:
    """Sums what enters an output projection `out`, and eliminates when the walk leaves the layer.

    rows: the projection's, [F, D]. behind: of what a layer did to some sequences, the stream that losses are measured
        by.
    order: (covariance of what was read [F, F], rows) -> when each goes, what is lost once so many are gone.
    """

    def __init__(self, runner: LayerRunner, out: nn.Module, behind: Behind, order: Order = eliminate) -> None:
        self.runner, self.behind, self.order = runner, behind, order
        weight: Any = out.weight
        self.rows = (weight if runner.family.transposed else weight.T).detach().float().clone()
        self.active: Tensor | None = None
        self.moments, self.stream = Moments(outer=True), Moments(outer=False)
        self.hook = out.register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.active = inputs[0].detach()

    def see(self, part: slice, parts: Parts) -> None:
        """Add the sums of some sequences."""
        if self.active is None:
            return
        real = self.runner.real(parts.entered).flatten()
        self.moments.add(self.active.flatten(0, -2)[real].float())
        self.stream.add(self.behind(parts).flatten(0, -2)[real].float())
        self.active = None

    def found(self, share: Share) -> Elimination:
        """The order, and what is lost."""
        self.hook.remove()
        self.moments.complete(share)
        self.stream.complete(share)
        order, lost = self.order(self.moments.covariance(), self.rows)
        scale = max(self.stream.spread(), torch.finfo(torch.float32).tiny)
        return Elimination(order.cpu(), lost.cpu().flip(0) / scale)


class Moments:
    """Running sums of vectors, counted from the mean of the first ones, so that little cancels."""

    def __init__(self, outer: bool) -> None:
        self.outer, self.count = outer, 0
        self.centre: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Vectors [n, H]."""
        if self.centre is None:
            self.centre = rows.mean(0)
            send(0, [self.centre])  # sums of all processes are counted from one
            self.first = torch.zeros_like(self.centre, dtype=torch.float64)
            self.second = rows.new_zeros((rows.shape[1],) * 2 if self.outer else ())
        rows = rows - self.centre
        self.count += len(rows)
        self.first += rows.sum(0)
        if self.outer:
            self.second.addmm_(rows.T, rows)
        else:
            self.second += rows.square().sum()

    def complete(self, share: Share) -> None:
        """Add the sums of the other processes' sequences."""
        share.add_up(self.first, self.second)
        self.count = round(share.number(self.count))

    def covariance(self) -> Tensor:
        """[H, H]; uses up the sums."""
        mean = (self.first / self.count).float()
        return self.second.div_(self.count).addr_(mean, mean, alpha=-1)

    def spread(self) -> float:
        """Mean squared distance from the mean."""
        return float(self.second / self.count - (self.first / self.count).square().sum())


def _measured(scene: Scene, requests: Sequence[Channels]) -> Mapping[str, Any]:
    layers = frozenset(layer for request in requests for layer in request.layers)
    found = eliminate_channels(scene.runner, scene.tokens, layers, scene.batch)
    return {
        "ffn_elimination": {layer: each.order for layer, each in found.items()},
        "ffn_elimination_loss": {layer: each.loss for layer, each in found.items()},
    }


ELIMINATION = Score(_measured, tokens=8192)
