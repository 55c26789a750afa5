"""Which heads of an attention can go, and what each number of them costs once the others make up for those.

As with an FFN's channels (channels.py), whole heads or whole key/value groups at a time: what the output projection
reads of a head is one group of its columns (ZipLM, arXiv 2302.04089; OSSCAR, arXiv 2403.12983).

Shapes: n tokens, D model width, F = heads * head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from llmsurgeon.analysis.channels import Elimination, ReadBy
from llmsurgeon.analysis.elimination import eliminate_groups
from llmsurgeon.analysis.score import Scene, Score
from llmsurgeon.analysis.watch import watch
from llmsurgeon.operations.prune_heads import Heads
from llmsurgeon.walk.runner import LayerRunner


def eliminate_heads(
    runner: LayerRunner, tokens: Tensor, sizes: Mapping[int, int], batch: int = 4
) -> dict[int, Elimination]:
    """Layer -> the order in which groups of what its output projection reads go.

    loss: as of channels, against the stream behind the attention. Memory: two matrices [F, F] in float32.

    Args:
        tokens: [S, T]. sizes: layer -> columns in a group.
    """
    path = f"{runner.family.attention}.{runner.family.attention_out}"

    def watcher(layer: int, module: nn.Module) -> ReadBy:
        order = partial(eliminate_groups, size=sizes[layer])
        return ReadBy(runner, module.get_submodule(path), lambda parts: parts.attended, order)

    return watch(runner, tokens, watcher, sizes.keys(), "order heads", batch, "attention")


def _measured(scene: Scene, requests: Sequence[Heads]) -> Mapping[str, Any]:
    made: dict[str, Any] = {}
    for unit in dict.fromkeys(request.unit for request in requests):
        sizes = {layer: size for each in requests if each.unit == unit for layer, size in each.sizes}
        found = eliminate_heads(scene.runner, scene.tokens, sizes, scene.batch)
        made[f"{unit}_elimination"] = {layer: each.order for layer, each in found.items()}
        made[f"{unit}_elimination_loss"] = {layer: each.loss for layer, each in found.items()}
    return made


HEADS = Score(_measured, tokens=8192)
