"""How large what a linear reads is: the gain of the norm that is put before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmsurgeon.analysis.score import Scene, Score, batches
from llmsurgeon.operations.sub_norms import Norms
from llmsurgeon.processes.share import Share
from llmsurgeon.progress import Progress
from llmsurgeon.walk.runner import LayerRunner


def input_sizes(
    runner: LayerRunner, tokens: Tensor, wanted: Mapping[int, Sequence[str]], batch: int = 4
) -> dict[int, dict[str, float]]:
    """Layer -> path of a linear inside it -> geometric mean over tokens of the RMS of what it reads.

    The geometric mean, as the few tokens that gather attention are larger by orders of magnitude.

    Args:
        tokens: [S, T].
        wanted: layer -> paths of linears.
    """
    share = Share.of(len(tokens))
    tokens = share.mine(tokens)
    stream = torch.cat([runner.embed(tokens[part]).cpu() for part in batches(tokens, batch)])
    found: dict[int, dict[str, float]] = {}
    with torch.no_grad(), Progress("measure what linears read", len(runner.layers), "layers") as progress:
        for index in range(len(runner.layers)):
            with runner.loaded(index) as layer:
                logs: dict[str, list[Tensor]] = {path: [] for path in wanted.get(index, ())}

                def keep(path: str, logs: Any = logs) -> Any:
                    return lambda _, inputs: logs[path].append(
                        inputs[0].float().square().mean(-1).clamp_min(1e-24).log().flatten() / 2
                    )

                hooks = [layer.get_submodule(path).register_forward_pre_hook(keep(path)) for path in logs]
                for part in batches(tokens, batch):
                    stream[part] = runner.whole(index, stream[part].to(runner.device)).cpu()
                for hook in hooks:
                    hook.remove()
                if logs:
                    found[index] = {path: share.mean(torch.cat(seen)).exp().item() for path, seen in logs.items()}
            progress.advance()
    return found


def _measured(scene: Scene, requests: Sequence[Norms]) -> Mapping[str, Any]:
    writers = {index: paths for request in requests for index, paths in request.writers.items()}
    return {"ternary_inputs": input_sizes(scene.runner, scene.tokens, writers, scene.batch)}


INPUTS = Score(_measured, tokens=2048)
