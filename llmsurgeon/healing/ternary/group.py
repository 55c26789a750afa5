"""Linears that read one input: moved to make up for what is ternary before them, then made ternary themselves.

    align       W <- W + M,  M = argmin ||X M^T - (Y - X W^T)||^2 + ridge * mean(diag(X^T X)) ||M||^2, with X what they
                read, Y what they gave in the dense student, for projections that write the stream with its drift added
    ternarise   codes and scales of llmsurgeon/model/ternary.py, from the same X^T X

Shapes: n tokens, I inputs and O outputs of a linear: X [n, I]; Y [n, O]; W [O, I].
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmsurgeon.healing.batches import token_weights
from llmsurgeon.healing.refit.ridge import Moments, Sums, best_update
from llmsurgeon.healing.ternary.context import DenseLayer, Group, LayerCodes
from llmsurgeon.healing.ternary.linears import TernaryLinear
from llmsurgeon.model.ternary import compensated, fitted_gain


class _Reached(Exception):
    """The forward pass has come to what was waited for."""


def fit_group(here: LayerCodes, group: Group, dense: DenseLayer, behind: Tensor | None) -> None:
    """Align and ternarise a group. `behind`: the ternary student's stream behind its attention, where that is known."""
    context, index = here.context, here.index
    chosen = [name for name in group.modules if f"{name}.weight" in context.chosen.get(index, ())]
    # An earlier group of this layer may have made a difference, too.
    new_norm = any(name in context.normed.get(index, ()) for name in group.modules)
    aligns = bool((here.drifted or new_norm or here.made) and context.ridges)
    if not chosen and not aligns:
        return
    moments = _moments(here, group, dense, behind, aligns)
    update, _, moved = best_update(moments, context.ridges) if aligns else (None, None, 1.0)
    gram = moments.fits.sums().gram
    moments.judges = Sums()  # they have judged, and what follows takes several of its size
    sizes = [here.weight(name).shape[0] for name in group.modules]
    changes = update.T.split(sizes) if update is not None else [None] * len(sizes)
    for name, change in zip(group.modules, changes, strict=True):
        weight = here.weight(name)
        if change is not None:
            weight.copy_((weight.float() + change).to(weight.dtype))
        if name in chosen:
            stored = here.runner.weights[f"{here.family.layer(index)}{name}.weight"].dtype
            made, error, rounding = compensated(weight, gram, context.grid, stored)
            if new_norm:
                gain = here.norm(name).weight.data
                factors, error = fitted_gain(weight, made, gram, error)
                gain.copy_((gain.float() * factors).to(gain.dtype))
            weight.copy_(made)
            zeros = float((made == 0).float().mean())
            here.made.append(TernaryLinear(index, name, error, rounding, zeros, moved))


def _moments(here: LayerCodes, group: Group, dense: DenseLayer, behind: Tensor | None, aligns: bool) -> Moments:
    """Sums of what the group reads and, where it is aligned, of what is missing in what it gives."""
    mine = here.mine if behind is None else behind
    before, after = (here.dense, dense.attended) if group.part == "attention" else (dense.attended, dense.left)
    drift = _drift(here, group, before, mine)
    weights = token_weights(after) if group.writes else None
    moments = Moments(judging=None if aligns else 0)
    modules = [here.module.get_submodule(name) for name in group.modules]
    for part, held in here.context.batches.parts:
        if held and not aligns:
            continue  # nothing is judged
        features = _read(here, group, part, mine)
        residual = features.new_zeros(len(features), 0)
        if aligns:
            missing = [
                # Not by a call: a norm before it has been at the features already.
                dense.outputs[name][part].to(features.device).float().flatten(0, -2) - module.forward(features).float()
                for name, module in zip(group.modules, modules, strict=True)
            ]
            residual = torch.cat(missing, dim=1)
            if drift is not None:
                residual = residual + drift[part].to(features.device).float().flatten(0, 1)
        if weights is not None:
            each = weights[part].to(features.device).reshape(-1, 1)
            features, residual = features.float() * each, residual * each
        moments.add(features, residual, held)
    return moments.complete()


def _drift(here: LayerCodes, group: Group, dense: Tensor, mine: Tensor) -> Tensor | None:
    """What a projection that writes the stream is to make up for, before the factor on it, [S, T, D]."""
    family = here.family
    post_norm = family.attention_post_norm if group.part == "attention" else family.ffn_post_norm
    if not group.writes or post_norm or dense is mine:
        return None
    return (dense.float() - mine.float()) / float(here.module.residual_multiplier)


def _read(here: LayerCodes, group: Group, part: slice, mine: Tensor) -> Tensor:
    """What the group's linears read of some sequences, [n, I]."""
    runner, seen = here.runner, list[Tensor]()

    def reached(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].detach().flatten(0, -2))
        raise _Reached

    hooks = [here.module.get_submodule(name).register_forward_pre_hook(reached) for name in group.modules]
    try:
        if group.part == "attention":
            runner.attend(here.index, here.mine[part].to(runner.device))
        else:
            read = here.mine if runner.parallel_residual else mine
            runner.feed_forward(here.index, read[part].to(runner.device))
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return seen[0]
