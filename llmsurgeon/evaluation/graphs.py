"""Decoding in a CUDA graph: every launch of a step is recorded once, and steps are replays.

What engines do, and without it a small model's time is that of Python between launches. The cache has its full size
from the start, so each step attends over all of it, and what cannot have such a cache (MLGRUs, block transformers) is
refused.

B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmsurgeon.boundary.foreign import first_lines
from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats.caches import cached_call

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

# Steps before a graph is recorded: libraries make their handles and triton compiles in them.
WARM_UP = 3


class GraphedSteps:
    """Greedy decode steps of a model behind a prompt [B, T], ready to be replayed `new_tokens` times.

    Raises:
        SurgeryError: the model's step cannot be recorded; the message says why.
    """

    def __init__(self, model: PreTrainedModel, ids_BT: Tensor, new_tokens: int, given: dict[str, Any]) -> None:
        from transformers import StaticCache

        length = ids_BT.shape[1] + new_tokens + WARM_UP + 1
        try:
            self.cache: Cache = StaticCache(config=model.config, max_cache_len=length)
            self._model, self._given = model, given
            output, _ = cached_call(model, self.cache, input_ids=ids_BT, **given)
            self.token_B1 = output.logits[:, -1:].argmax(-1)
            self._step = captured(self._next)
        except SurgeryError:
            raise
        except Exception as error:  # each model has reasons of its own
            raise SurgeryError(
                f"bench: a decode step of {type(model).__name__} cannot be recorded as a CUDA graph "
                f"({first_lines(error, 200)}); leave out --graph"
            ) from error

    def _next(self) -> None:
        """One step; the token stays where it is."""
        output, _ = cached_call(self._model, self.cache, input_ids=self.token_B1, **self._given)
        self.token_B1.copy_(output.logits[:, -1:].argmax(-1))

    def step(self) -> Tensor:
        """One more token of each sequence, [B, 1]; the next step writes over it."""
        self._step()
        return self.token_B1


def captured(function: Callable[[], None]) -> Callable[[], None]:
    """What replays a function as one CUDA graph, after it has run a few times to warm up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    replay: Callable[[], None] = graph.replay
    return replay
