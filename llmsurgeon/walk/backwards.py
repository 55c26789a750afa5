"""The layers walked from the last to the first: gradients with respect to what enters each, one layer in memory.

Shapes: M gradients, N layers, S sequences, T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmsurgeon.progress import track
from llmsurgeon.walk.runner import LayerRunner
from llmsurgeon.walk.streams import Streams


def pulled_back(runner: LayerRunner, entered: Tensor, parts: Sequence[slice], gradients: Tensor) -> Tensor:
    """Gradients of M numbers with respect to the stream behind each layer, from those behind the last one.

    Args:
        entered: what enters each layer, [>= N, S, T, D]. parts: the sequences that go through a layer together.
        gradients: [M, S, T, D], of M numbers with respect to what leaves the last layer.

    Returns:
        [N, M, S, T, D]: at n what leaves layer n is meant; in memory, or in a temporary file (`Streams`).

    Raises:
        SurgeryError: a hidden state is not finite, or the disk is full.
    """
    count = len(runner.layers)
    found = Streams(count, tuple(gradients.shape), gradients.dtype).data
    found[-1] = gradients
    for index in track(range(count - 1, 0, -1), "walk back", unit="layers"):
        with runner.loaded(index) as layer:
            layer.requires_grad_(False)
            for part in parts:
                # Not inference, whatever the caller is in: what the layer does is recorded.
                with torch.enable_grad():
                    hidden = entered[index, part].to(runner.device).requires_grad_(True)
                    left = runner.whole(index, hidden)
                last = len(gradients) - 1
                for number, gradient in enumerate(found[index, :, part]):
                    (pulled,) = torch.autograd.grad(
                        left, hidden, gradient.to(runner.device), retain_graph=number < last
                    )
                    found[index - 1, number, part] = pulled.cpu()
    return found
