"""What each expert of a mixture is worth to its layer, on one walk.

n tokens, D model width, E experts, k experts a token.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmsurgeon.progress import Progress
from llmsurgeon.walk.runner import LayerRunner
from llmsurgeon.walk.variants import Variant
from llmsurgeon.walk.walk import Parts, walk


@dataclass(frozen=True)
class Worth:
    """reap: mean over the tokens sent to an expert of router weight * ||what it gives||, [E] (REAP, arXiv
        2510.13999); 0 where none was.

    loss: mean over all tokens of ||change of what the mixture gives, without the expert||^2, [E]; None if nobody asks.
    """

    reap: Tensor
    loss: Tensor | None


def weigh_experts(
    runner: LayerRunner, tokens: Tensor, layers: Collection[int], with_loss: bool, batch: int = 4
) -> dict[int, Worth]:
    """Layer -> what its experts are worth.

    Args:
        tokens: [S, T].
        with_loss: also route each token anew without each of its experts, which costs k times a pass.
    """
    with Progress("weigh experts", len(layers), "layers") as progress:
        watch = _Watch(runner, frozenset(layers), with_loss, progress)
        walk(runner, tokens, [Variant()], watch, batch=batch, enter=watch.enter)
        watch.finish()
    return watch.found


class _Watch:
    """Sees what each wanted mixture reads, and sums what its experts make of it."""

    def __init__(self, runner: LayerRunner, wanted: frozenset[int], with_loss: bool, progress: Progress) -> None:
        self.runner, self.wanted, self.with_loss, self.progress = runner, wanted, with_loss, progress
        self.found: dict[int, Worth] = {}
        self.layer: int | None = None

    def enter(self, layer: int, module: nn.Module) -> None:
        """The walk has loaded a layer."""
        self.finish()
        experts = self.runner.family.experts
        if layer not in self.wanted or experts is None or not self.runner.feeds_forward(layer):
            return
        self.layer, self.block = layer, module
        mixture: Any = module.get_submodule(experts.module)
        self.mixture, count = mixture, len(mixture.gate.weight)
        self.size, self.sent, self.lost = (torch.zeros(count, dtype=torch.float64) for _ in range(3))
        self.tokens = 0

    def __call__(self, layer: int, part: slice, variant: int, mine: Parts, base: Parts) -> None:
        if layer != self.layer:
            return
        block: Any = self.block
        with torch.no_grad():
            read = block.ffn_input(mine.ffn_input.to(self.runner.device))
            self._add(read[self.runner.real(mine.entered)])

    def _add(self, read: Tensor) -> None:
        """Tokens [n, D]."""
        mixture = self.mixture
        _, weights, chosen = mixture.gate(read)
        gave = mixture.experts(read, chosen, weights).float() if self.with_loss else read
        self.tokens += len(read)
        for expert in range(len(self.size)):
            token, place = torch.where(chosen == expert)
            if not len(token):
                continue
            only = torch.full_like(chosen[token][:, :1], expert)
            alone = mixture.experts(read[token], only, weights[token, place][:, None])
            self.size[expert] += alone.float().norm(dim=-1).sum().item()
            self.sent[expert] += len(token)
        for expert in range(len(self.size)) if self.with_loss else ():
            # Where weights are not normed over the chosen, one row fewer changes them for every token.
            normed = getattr(mixture.gate, "norm_topk_prob", True)
            token = (chosen == expert).any(-1).nonzero()[:, 0] if normed else torch.arange(len(read))
            self.lost[expert] += (self._without(read[token], expert) - gave[token]).square().sum().item()

    def _without(self, read: Tensor, expert: int) -> Tensor:
        """What the mixture gives where the router has no row for one expert."""
        gate, experts = self.mixture.gate, self.mixture.experts
        whole = gate.weight
        others = torch.tensor([e for e in range(len(whole)) if e != expert], device=whole.device)
        top_k = gate.top_k
        try:
            gate.weight, gate.top_k = nn.Parameter(whole[others], requires_grad=False), min(top_k, len(others))
            _, weights, chosen = gate(read)
        finally:
            gate.weight, gate.top_k = whole, top_k
        made: Tensor = experts(read, others[chosen], weights)
        return made.float()

    def finish(self) -> None:
        """The walk has left the layer."""
        if self.layer is not None:
            loss = (self.lost / self.tokens).float() if self.with_loss else None
            self.found[self.layer] = Worth((self.size / self.sent.clamp_min(1)).float(), loss)
            self.progress.advance()
        self.layer = None
