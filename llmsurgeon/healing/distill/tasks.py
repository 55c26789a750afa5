"""What is trained on and what judges: rows of text with what the parent says about them, and held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from llmsurgeon.evaluation.decoders import evaluate_hidden
from llmsurgeon.evaluation.encoders import evaluate_states
from llmsurgeon.healing.distill.case import Case
from llmsurgeon.healing.distill.data import Corpus
from llmsurgeon.healing.distill.module import real_tokens
from llmsurgeon.healing.distill.targets import AHEAD, Targets
from llmsurgeon.processes.share import Share
from llmsurgeon.walk.variants import Variant
from llmsurgeon.walk.walk import walk

if TYPE_CHECKING:
    from llmsurgeon.operations.distill import Distill


class GlobalTask:
    """Rows of the corpus with what the parent says about them, and the held-out text that judges."""

    ahead = AHEAD

    def __init__(self, case: Case, settings: Distill, corpus: Corpus, targets: Targets) -> None:
        self.case, self.settings, self.corpus, self.targets = case, settings, corpus, targets
        rows = max(1, settings.evaluation_tokens // case.held_out.shape[1])
        self.judged = case.held_out[:: max(1, len(case.held_out) // rows)][:rows]
        self._parent_last: Tensor | None = None

    def prepare(self, numbers: np.ndarray) -> None:
        """Ask the parent."""
        self.targets.prepare(numbers)

    def batch(self, numbers: np.ndarray, step: int, device: torch.device) -> dict[str, Any]:
        """ids, the parent's answers, the positions that carry the KL, and a block transformer's padding."""
        tokens = self.corpus.tokens(numbers)
        answers = {name: values.to(device) for name, values in self.targets.of(numbers, tokens).items()}
        return {
            "ids": tokens.to(device),
            **answers,
            **self._positions(tokens.shape[1], step, device),
            **self._padding(step),
        }

    def _padding(self, step: int) -> dict[str, int]:
        """A block transformer's first block has another number of tokens at each step, as prompts have."""
        if self.case.spec.block_transformer is None:
            return {}
        rng = np.random.default_rng([self.settings.seed, step, 1])
        return {"padding": int(rng.integers(self.case.spec.block_transformer.block_length))}

    def _positions(self, length: int, step: int, device: torch.device) -> dict[str, Tensor]:
        """A share of the positions, other ones at each step; the same for all sequences and processes."""
        if self.settings.positions == 1 or not self.settings.kl:
            return {}
        count = max(1, round(length * self.settings.positions))
        chosen = np.random.default_rng([self.settings.seed, step]).choice(length, count, replace=False)
        return {"positions": torch.from_numpy(np.sort(chosen)).to(device)}

    @property
    def _all_rows(self) -> Share:
        """A module that is spread over processes is called by all of them, equally often."""
        return Share(len(self.judged))

    def judge(self, module: nn.Module) -> dict[str, float]:
        """KL to the parent (the value), perplexity ratio, top-1 agreement, both losses on the held-out sequences."""
        parent, device = self.case.parent, next(module.parameters()).device
        if self._parent_last is None:
            self._parent_last = walk(parent, self.judged, [Variant()], batch=self.case.batch)[0]
        last = self._parent_last
        found = evaluate_hidden(
            self.judged,
            lambda row: module(self.judged[row : row + 1].to(device))["logits"],
            lambda row: parent.final(last[row].to(parent.device)),
            share=self._all_rows,
        )
        assert found.kl is not None and found.perplexity_ratio is not None and found.top1_agreement is not None
        assert found.parent_perplexity is not None
        measures = {"kl": found.kl, "perplexity_ratio": found.perplexity_ratio, "top1": found.top1_agreement}
        losses = {"loss": math.log(found.perplexity), "parent_loss": math.log(found.parent_perplexity)}
        return {"value": found.kl, **measures, **losses}


class EncoderTask(GlobalTask):
    """Rows as `GlobalTask` has them, without the columns that are padding in all of a batch; judged by cosines."""

    _parent_states: Callable[[int], Tensor] | None = None

    def batch(self, numbers: np.ndarray, step: int, device: torch.device) -> dict[str, Any]:
        """ids and the parent's answers."""
        tokens = self.corpus.tokens(numbers)
        length = int(real_tokens(tokens, self.case.parent.padding).any(0).nonzero().max()) + 1
        tokens = tokens[:, :length]
        answers = self.targets.of(numbers, tokens)
        return {"ids": tokens.to(device), **{k: v[..., :length, :].to(device) for k, v in answers.items()}}

    def judge(self, module: nn.Module) -> dict[str, float]:
        """1 - cos of pooled states on the held-out sequences (the value; of hidden ones where those alone are trained
        on), and both cosines."""
        parent, device = self.case.parent, next(module.parameters()).device
        if self._parent_states is None:
            last = walk(parent, self.judged, [Variant()], batch=self.case.batch)[0]
            self._parent_states = lambda row: parent.states(last[row][self._real(row)].to(parent.device))
        with torch.no_grad():
            states = (lambda row: self._own(module, row, device), self._parent_states)
            found = evaluate_states(self.judged, states, share=self._all_rows)
        cosines = {"pooled_cosine": found.pooled_cosine, "hidden_cosine": found.hidden_cosine}
        measures = {name: value for name, value in cosines.items() if value is not None}
        return {"value": 1 - measures["pooled_cosine" if self.settings.pooled else "hidden_cosine"], **measures}

    def _real(self, row: int) -> Tensor:
        return real_tokens(self.judged[row], self.case.parent.padding)

    def _own(self, module: nn.Module, row: int, device: torch.device) -> Tensor:
        """The student's last hidden states of a held-out sequence, without its padding."""
        states: Tensor = module(self.judged[row][self._real(row)][None].to(device))["states"][0]
        return states
