"""Mixer: an MLGRU in the place of an attention learns to add what the attention added.

Its output projection W_o is moved so that the student's stream X behind it meets the parent's, P, behind the attention
whose place it took, from the gated states A that the projection reads:

    W_o <- W_o + dW,  dW = argmin ||A dW^T - (P - X)||^2 + ridge * mean(diag(A^T A)) ||dW||^2

Shapes: n tokens, F channels of the state, D model width: A [n, F]; X, P [n, D]; W_o [D, F].
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmsurgeon.healing.refit.context import LayerFit, weights_in
from llmsurgeon.healing.refit.projection import output_projection
from llmsurgeon.healing.refit.ridge import best_update
from llmsurgeon.model.parts import MLGRUSpec

# An MLGRU's output projection was made for other inputs: there is little in it that a ridge should hold on to.
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 0.1)


def is_new(here: LayerFit) -> bool:
    """True where an MLGRU took an attention's place."""
    return isinstance(here.spec.attention, MLGRUSpec) and here.changed


def fit_mixer(here: LayerFit) -> None:
    """Fit the output projection, and take the student's stream behind it."""
    wanted = here.read[here.span.index(here.spec.parents[0])]
    device, out = here.student.device, output_projection(here, "attention")
    states: list[Tensor] = []

    def batch(part: slice) -> tuple[Tensor, Tensor]:
        entered = here.entered[part].to(device)
        contribution = here.student.attend(here.index, entered)
        assert contribution is not None
        states.append(out.read.cpu())
        return out.features(), wanted[part].to(device).float() - (entered + contribution).float()

    with out:
        moments = here.moments(batch, weights_in(wanted))
    update, ridge, error = best_update(moments, RIDGES)
    here.note(out.name, ridge, error)
    if update is not None:
        out.move(update)
    behind = torch.empty_like(here.entered)
    for (part, _), read in zip(here.context.batches.parts, states, strict=True):
        behind[part] = (here.entered[part].to(device) + out.contribution(read.to(device))).cpu()
    here.attended = behind
