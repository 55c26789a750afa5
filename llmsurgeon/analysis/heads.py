"""Which heads of an attention can go, and what each number of them costs once the others make up for those.

As with an FFN's channels (channels.py), whole heads or whole key/value groups at a time: what the output projection
reads of a head is one group of its columns (ZipLM, arXiv 2302.04089; OSSCAR, arXiv 2403.12983).

Shapes: n tokens, D model width, F = heads * head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmsurgeon.analysis.channels import Elimination, Moments
from llmsurgeon.analysis.elimination import eliminate_groups
from llmsurgeon.analysis.score import Scene, Score
from llmsurgeon.analysis.watch import watch
from llmsurgeon.operations.prune_heads import Heads
from llmsurgeon.walk.runner import LayerRunner
from llmsurgeon.walk.walk import Parts


def eliminate_heads(
    runner: LayerRunner, tokens: Tensor, sizes: Mapping[int, int], batch: int = 4
) -> dict[int, Elimination]:
    """Layer -> the order in which groups of what its output projection reads go.

    loss: as of channels, against the stream behind the attention. Memory: two matrices [F, F] in float32.

    Args:
        tokens: [S, T]. sizes: layer -> columns in a group.
    """
    return watch(
        runner,
        tokens,
        lambda layer, module: _Heads(runner, module, sizes[layer]),
        sizes.keys(),
        "order heads",
        batch,
        "attention",
    )


class _Heads:
    """Sums what enters an attention's output projection, and eliminates when the walk leaves the layer."""

    def __init__(self, runner: LayerRunner, module: nn.Module, size: int) -> None:
        self.runner, self.size, family = runner, size, runner.family
        out = module.get_submodule(f"{family.attention}.{family.attention_out}")
        weight: Any = out.weight
        self.rows = weight.T.detach().float().cpu().clone()
        self.read: Tensor | None = None
        self.heads, self.stream = Moments(outer=True), Moments(outer=False)
        self.hook = out.register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.read = inputs[0].detach()

    def see(self, part: slice, parts: Parts) -> None:
        """Add the sums of some sequences."""
        if self.read is None:
            return
        real = self.runner.real(parts.entered).flatten()
        self.heads.add(self.read.flatten(0, -2)[real].float().cpu())
        self.stream.add(parts.attended.flatten(0, -2)[real].float().cpu())
        self.read = None

    def found(self) -> Elimination:
        """The order, and what is lost."""
        self.hook.remove()
        order, lost = eliminate_groups(self.heads.covariance(), self.rows, self.size)
        scale = max(self.stream.spread(), torch.finfo(torch.float32).tiny)
        return Elimination(order, lost.flip(0) / scale)


def _measured(scene: Scene, requests: Sequence[Heads]) -> Mapping[str, Any]:
    made: dict[str, Any] = {}
    for unit in dict.fromkeys(request.unit for request in requests):
        sizes = {layer: size for each in requests if each.unit == unit for layer, size in each.sizes}
        found = eliminate_heads(scene.runner, scene.tokens, sizes, scene.batch)
        made[f"{unit}_elimination"] = {layer: each.order for layer, each in found.items()}
        made[f"{unit}_elimination_loss"] = {layer: each.loss for layer, each in found.items()}
    return made


HEADS = Score(_measured, tokens=8192)
