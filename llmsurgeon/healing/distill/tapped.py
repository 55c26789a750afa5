"""A language model that also gives the hidden states behind some of its layers.

B sequences, L tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from llmsurgeon.walk.runner import Given


def masked(ids: Tensor, padding: int | None) -> dict[str, Tensor]:
    """What a model is to be told of padding in `ids`."""
    return {} if padding is None else {"attention_mask": (ids != padding).long()}


class TappedModel(nn.Module):
    """A language model that also gives the hidden states behind some of its layers.

    Calling it with ids [B, L] gives ([B, L, D] for each tap, last hidden states [B, L, D], final norm included).
    """

    def __init__(self, model: Any, layers: str, taps: Sequence[int], encoder: bool = False) -> None:
        super().__init__()
        self.model, self.encoder = model, encoder
        self._given: dict[str, Any] = {} if encoder else {"use_cache": False}
        self._seen: dict[int, Tensor] = {}
        self.taps = tuple(taps)
        found = model.get_submodule(layers)
        for tap in self.taps:
            found[tap].register_forward_hook(self._see(tap))

    def _see(self, tap: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            # Gradient checkpointing calls a layer again on the way back: the first output is the one in the graph.
            self._seen.setdefault(tap, output[0] if isinstance(output, tuple) else output)

        return hook

    def forward(self, ids: Tensor, **kwargs: Any) -> tuple[list[Tensor], Tensor]:
        """Hidden states behind the taps, and behind the final norm; `kwargs` are for the model's body."""
        self._seen.clear()
        states = self.model.base_model(input_ids=ids, **self._given, **kwargs).last_hidden_state
        ends = [self._seen[tap] for tap in self.taps]
        return ends, states

    def logits(self, states_TD: Tensor) -> Tensor:
        """The head, as the model's own class computes it: last hidden states [T, D] -> logits [T, V]."""
        return head_logits(self.model, states_TD)


def head_logits(model: Any, states_TD: Tensor) -> Tensor:
    """Last hidden states [T, D] (final norm included) -> logits [T, V], scaled and capped as the model's class does."""
    body = model.base_model
    setattr(model, model.base_model_prefix, Given())
    try:
        logits: Tensor = model(inputs_embeds=states_TD[None]).logits[0]
    finally:
        setattr(model, model.base_model_prefix, body)
    return logits
