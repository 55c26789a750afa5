"""A closed-form update: the linear map, fitted to what the parent's run adds."""

from __future__ import annotations

import torch

from extending.part import LinearSpec
from llmsurgeon.healing.refit.refit import UPDATES, ClosedForm
from llmsurgeon.healing.refit.ridge import best_update


def is_linear(here):
    """True at a layer that is a linear map."""
    return isinstance(here.spec.ffn, LinearSpec)


def fit_map(here):
    """W, b <- argmin ||A W^T + b - (P - X)||^2 + ridge: A normed student's stream, P parent's behind the run."""
    linear = here.module.get_submodule(here.family.fast_ffn)
    stream = here.ffn_stream()

    def batch(part):
        x = stream[part]
        read = here.module.ffn_input(x).float()
        return torch.cat([read, read.new_ones(*read.shape[:-1], 1)], -1), (here.parent[part] - x).float()

    update, ridge, error = best_update(here.moments(batch), here.options.ridges)
    here.note("linear map", ridge, error)
    if update is not None:
        linear.weight.copy_(update[:-1].T)
        linear.bias.copy_(update[-1])


UPDATES["linear map"] = ClosedForm(is_linear, fit_map)
