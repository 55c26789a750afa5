"""What each linear costs when it becomes ternary: how far its layer's output moves, on one walk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmsurgeon.analysis.score import Scene, Score, batches
from llmsurgeon.model.ternary import Grid, rounded
from llmsurgeon.operations.ternary import Linears
from llmsurgeon.processes.share import Share
from llmsurgeon.progress import Progress
from llmsurgeon.walk.runner import LayerRunner

Cost = tuple[float, int, int]


def ternary_costs(
    runner: LayerRunner, tokens: Tensor, wanted: Mapping[int, Sequence[str]], grid: Grid, batch: int = 4
) -> dict[int, dict[str, Cost]]:
    """Layer -> weight's name inside it -> (error, numbers, bytes of one of them).

    The error is that of rounding this weight alone: mean over tokens of ||change of what leaves the layer||^2 /
    ||what leaves it||^2.

    Args:
        tokens: [S, T].
        wanted: layer -> the weights to measure.
    """
    share = Share.of(len(tokens))
    tokens = share.mine(tokens)
    parts = batches(tokens, batch)
    stream = torch.cat([runner.embed(tokens[part]).cpu() for part in parts])
    positions = share.total * tokens.shape[1]
    found: dict[int, dict[str, Cost]] = {}
    with torch.no_grad(), Progress("measure ternary linears", len(runner.layers), "layers") as progress:
        for index in range(len(runner.layers)):
            with runner.loaded(index) as layer:
                entered = stream.clone()
                for part in parts:
                    stream[part] = runner.whole(index, entered[part].to(runner.device)).cpu()
                for name in wanted.get(index, ()):
                    stored = runner.weights[runner.family.layer(index) + name]
                    module = layer.get_submodule(name.removesuffix(".weight"))
                    error = share.number(_error(runner, index, module, grid, (entered, stream), batch)) / positions
                    found.setdefault(index, {})[name] = (error, stored.numel(), stored.dtype.itemsize)
            progress.advance()
    return found


def _error(
    runner: LayerRunner, index: int, module: Any, grid: Grid, streams: tuple[Tensor, Tensor], batch: int
) -> float:
    """The error of `Cost` for the weight of one linear of the loaded layer, from what entered and what left it, summed
    over tokens."""
    entered, left = streams
    dense = module.weight.data
    weight = rounded(dense.T if runner.family.transposed else dense, grid)
    module.weight.data = weight.T if runner.family.transposed else weight
    total = 0.0
    for part in batches(entered, batch):
        before = left[part].to(runner.device).float()
        after = runner.whole(index, entered[part].to(runner.device)).float()
        total += float(((after - before).square().sum(-1) / before.square().sum(-1).clamp_min(1e-30)).sum())
    module.weight.data = dense
    return total


def stored_bytes(weights: Mapping[str, Tensor]) -> int:
    """Bytes of all tensors; read as views, so the disk is not touched."""
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in map(weights.__getitem__, weights))


def _measured(scene: Scene, requests: Sequence[Linears]) -> Mapping[str, Any]:
    found: dict[int, dict[str, Cost]] = {}
    for request in requests:
        costs = ternary_costs(scene.runner, scene.tokens, request.linears, request.grid, scene.batch)
        for layer, each in costs.items():
            found.setdefault(layer, {}).update(each)
    return {"ternary": found, "ternary_bytes": stored_bytes(scene.runner.weights)}


TERNARY = Score(_measured, tokens=2048)
