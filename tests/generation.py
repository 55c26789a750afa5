"""What tests ask of generation: a model that reads its cache writes what it writes without one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmsurgeon.formats.caches import cached_call


@torch.no_grad()
def generate(model: Any, prompt: Tensor, **how: Any) -> Tensor:
    """`model.generate` of a prompt [B, T], held against the same without a cache; token by token, unless `how` samples.

    Everything is seen unless an attention_mask is given. The prompt's continuation is asked for by max_new_tokens.
    """
    how = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt), **how}
    made = []
    for cached in (True, False):
        torch.manual_seed(0)
        made.append(model.generate(prompt, use_cache=cached, **how))
    assert torch.equal(*made), f"with a cache {made[0].tolist()}, without {made[1].tolist()}"
    assert made[0].shape[1] > prompt.shape[1], "nothing was generated"
    return made[0]


@torch.no_grad()
def in_pieces(model: Any, ids: Tensor, cuts: tuple[int, ...], **inputs: Any) -> tuple[Tensor, Any]:
    """(logits [B, T, V], the cache) of a model that reads ids [B, T] in pieces, which begin at 0 and at `cuts`."""
    pieces, cache = [], None
    for start, end in zip((0, *cuts), (*cuts, ids.shape[1]), strict=True):
        output, cache = cached_call(model, cache, input_ids=ids[:, start:end], **(inputs if not start else {}))
        pieces.append(output.logits)
    return torch.cat(pieces, 1), cache
