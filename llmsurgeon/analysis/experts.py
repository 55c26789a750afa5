"""What each expert of a mixture is worth to its layer, on one walk.

n tokens, D model width, E experts, k experts a token.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmsurgeon.analysis.score import Scene, Score
from llmsurgeon.analysis.watch import watch
from llmsurgeon.operations.base import Request
from llmsurgeon.processes.share import Share
from llmsurgeon.walk.runner import LayerRunner
from llmsurgeon.walk.walk import Parts


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
    if runner.family.experts is None:
        return {}
    path = runner.family.experts.module
    return watch(
        runner, tokens, lambda layer, module: _Experts(runner, module, path, with_loss), layers, "weigh experts", batch
    )


class _Experts:
    """Sees what a mixture reads, and sums what its experts make of it."""

    def __init__(self, runner: LayerRunner, layer: nn.Module, path: str, with_loss: bool) -> None:
        self.runner, self.layer, self.with_loss = runner, layer, with_loss
        mixture: Any = layer.get_submodule(path)
        self.mixture, count = mixture, len(mixture.gate.weight)
        self.size, self.sent, self.lost = (torch.zeros(count, dtype=torch.float64) for _ in range(3))
        self.tokens = 0

    def see(self, part: slice, parts: Parts) -> None:
        """Add what some sequences' tokens make the experts do."""
        layer: Any = self.layer
        with torch.no_grad():
            read = layer.ffn_input(parts.ffn_input.to(self.runner.device))
            self._add(read[self.runner.real(parts.entered)])

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

    def found(self, share: Share) -> Worth:
        """What each expert is worth."""
        share.add_up(self.size, self.sent, self.lost)
        tokens = share.number(self.tokens)
        loss = (self.lost / tokens).float() if self.with_loss else None
        return Worth((self.size / self.sent.clamp_min(1)).float(), loss)


def _measured(scene: Scene, requests: Sequence[Request]) -> Mapping[str, Any]:
    layers = {layer.parents[0] for layer in scene.subject.spec.layers if layer.ffn and layer.ffn.experts}
    with_loss = any(request.score == "expert_loss" for request in requests)
    found = weigh_experts(scene.runner, scene.tokens, layers, with_loss, scene.batch)
    scores: dict[str, Any] = {"expert_reap": {layer: worth.reap for layer, worth in found.items()}}
    if with_loss:
        scores["expert_loss"] = {layer: worth.loss for layer, worth in found.items()}
    return scores


EXPERTS = Score(_measured, tokens=8192)
