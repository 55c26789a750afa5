"""What each option will cost, foreseen without walking to the end: the second-order part of its KL.

A model with one option differs from its parent first by d, in what leaves the option's layer. The gradients of what
the parent says (`analysis.curvature`), pulled back to that place once for all options, tell what d costs at the end:

    KL(parent || parent with the option) ~ mean over draws of (g . d)^2 / 2

So an option takes its fit and its own layer, where a score takes the layers behind it and the head as well. What the
model does with a large change is not in it: what a search is about to choose it measures.

Shapes: N layers, M draws, S sequences, T tokens, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from llmsurgeon.analysis.curvature import drawn_gradients
from llmsurgeon.analysis.divergence import compared
from llmsurgeon.searching.fitting import Workshop
from llmsurgeon.searching.ground import Ground
from llmsurgeon.searching.options import Option
from llmsurgeon.walk.backwards import pulled_back

# Gradients that are drawn of each sequence. With 16 sequences a foreseen KL has a standard error of an eighth.
DRAWS = 8


@dataclass
class Foresight:
    """Foresees options; the gradients, [N, M, S, T, D], are there as long as it is."""

    ground: Ground
    workshop: Workshop
    draws: int = DRAWS

    @cached_property
    def _gradients(self) -> Tensor:
        ground = self.ground
        drawn = drawn_gradients(ground.runner, ground.scoring[-1], self.draws)
        return pulled_back(ground.runner, ground.scoring, ground.parts, drawn)

    def of(self, option: Option) -> Tensor:
        """What the parent with this option alone will differ by, of each sequence [S], as `Scorer` measures it."""
        ground, first, last = self.ground, option.layers[0], option.layers[-1]
        gradients = self._gradients[last]
        found = torch.zeros(len(ground.scores))
        with torch.no_grad(), self.workshop.standing(option) as beside:
            for part in ground.parts:
                entered = ground.scoring[first, part].to(beside.device)
                left = self.workshop.through(option, beside, entered)
                moved = left.float() - ground.scoring[last + 1, part].to(beside.device).float()
                for gradient in gradients[:, part]:
                    along = (gradient.to(beside.device).float() * moved).sum((-1, -2))
                    found[part] += along.square().cpu() / (2 * self.draws)
        return found / len(compared(ground.scores.shape[1]))
