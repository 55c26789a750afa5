"""Trees: of fast feedforward networks the rows that write are fitted on the tokens that meet them.

The FFN's output is linear in them once decisions and activations are given. Node form: one ridge regression on all
neurons, zero off the path. Leaf form: shared neurons see every token, a leaf's neurons and bias their own, so the
normal equations have one dense border and a block for each leaf; the leaves are eliminated one after the other, the
border is solved, and the leaves follow. Tokens that judge are never fitted: a leaf has hundreds of neurons for some ten
thousand tokens, and what it learnt by heart would pass for good in the evaluation on held-out text.

Shapes: n tokens, D model width, S shared neurons, L leaves, W neurons a leaf (and one for the bias).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmsurgeon.healing.refit.align import align
from llmsurgeon.healing.refit.context import LayerFit
from llmsurgeon.healing.refit.ridge import Moments, best_update
from llmsurgeon.model.parts import FFFSpec


def has_trees(here: LayerFit) -> bool:
    """True where the layer's FFN is a fast feedforward network."""
    return here.has_trees


def trees_drift(here: LayerFit) -> bool:
    """True where trees read something new."""
    return here.has_trees and here.options.align and here.drifted


def align_trees(here: LayerFit) -> None:
    """Align hyperplanes and neurons with what the FFN of the span's last layer read in the parent."""
    rows = readers(here.module.get_submodule(here.family.fast_ffn))
    streams = here.ffn_stream(), here.read[-1]
    align(here, f"ffn input of layer {here.spec.parents[0]}", here.module.ffn_input, streams, rows)


def fit_trees(here: LayerFit) -> None:
    """Fit the rows that write to what the parent's sum of stream and FFN was, before any norm behind it."""
    module, text, device = here.module.get_submodule(here.family.fast_ffn), here.context.batches, here.student.device
    stream, behind = here.ffn_stream(), here.behind_attention()
    summed = here.summed if here.family.post_norm else here.parent
    read, missing, judges = [], [], []
    for part, held in text.parts:
        inputs = text.rows(part, here.module.ffn_input(stream[part].to(device)))
        wanted = text.rows(part, summed[part].to(device)).float()
        start = text.rows(part, behind[part].to(device)).float()
        read.append(inputs)
        missing.append((wanted - start) / here.module.residual_multiplier - module(inputs).float())
        judges.append(torch.full((len(inputs),), held, device=device))
    fit = fit_leaves if isinstance(here.spec.ffn, FFFSpec) and here.spec.ffn.form == "leaf" else fit_nodes
    ridge, error = fit(module, torch.cat(read), torch.cat(missing), torch.cat(judges), here.options.ridges)
    here.note(here.family.fast_ffn, ridge, error)


@dataclass(frozen=True)
class LeafSums:
    """What the fit needs of one leaf's tokens: S^T S, S^T A, A^T A and, with what is missing, S^T M, A^T M."""

    shared: Tensor
    between: Tensor
    own: Tensor
    shared_missing: Tensor
    own_missing: Tensor

    @classmethod
    def of(cls, shared: Tensor, own: Tensor, missing: Tensor) -> LeafSums:
        """From activations of shared neurons [n, S], the leaf's own [n, W], and what is missing [n, D]."""
        return cls(shared.T @ shared, shared.T @ own, own.T @ own, shared.T @ missing, own.T @ missing)


def leaf_updates(leaves: Sequence[LeafSums], ridge: float) -> tuple[Tensor, list[Tensor]]:
    """argmin over X [S, D] and each leaf's Y_k [W, D] of sum_k ||shared_k X + own_k Y_k - missing_k||^2 + ridges.

    A ridge is a multiple of the mean diagonal of its group's Gram matrix, as in `ridge_solution`.
    """
    border = damped(torch.stack([leaf.shared for leaf in leaves]).sum(0), ridge)
    target = torch.stack([leaf.shared_missing for leaf in leaves]).sum(0)
    width = len(border)
    solved = []
    for leaf in leaves:
        sides = torch.cat([leaf.between.T, leaf.own_missing], dim=1)
        found = torch.linalg.solve(damped(leaf.own, ridge), sides)
        solved.append(found)
        border -= leaf.between @ found[:, :width]
        target -= leaf.between @ found[:, width:]
    common = torch.linalg.solve(border, target) if width else target
    return common, [found[:, width:] - found[:, :width] @ common for found in solved]


def damped(gram: Tensor, ridge: float) -> Tensor:
    """The Gram matrix with `ridge` times its mean diagonal added to the diagonal."""
    if not len(gram):
        return gram
    gram = gram.clone()
    # A leaf that no token reached keeps its rows.
    gram.diagonal().add_((ridge * gram.diagonal().mean()).clamp_min(1e-12))
    return gram


def fit_leaves(module: Any, read: Tensor, missing: Tensor, held: Tensor, ridges: Sequence[float]) -> tuple[Any, float]:
    """Move the output rows and biases of a leaf-form module so that its output gains `missing` [n, D].

    Returns (ridge, error on the held-out tokens relative to before), or (None, 1.0) where no ridge lowers it.

    Args:
        read: what the module reads, [n, D]; `held` [n] marks the tokens that only judge.
    """
    leaf = module.route(read)
    sums: list[LeafSums] = []
    judging: list[tuple[Tensor, Tensor, Tensor]] = []
    for k in range(module.leaves):
        fits, judges = (torch.nonzero((leaf == k) & (held == judge)).flatten() for judge in (False, True))
        sums.append(LeafSums.of(*_features(module, read[fits], missing[fits], k)))
        judging.append(_features(module, read[judges], missing[judges], k))
    before = sum(float(m.square().sum()) for _, _, m in judging)
    errors = {}
    for ridge in ridges:
        common, updates = leaf_updates(sums, ridge)
        after = sum(
            float((m - s @ common - a @ y).square().sum()) for (s, a, m), y in zip(judging, updates, strict=True)
        )
        errors[ridge] = after / before if before > 0 else 1.0
    ridge = min(errors, key=lambda r: errors[r])
    if not errors[ridge] < 1:
        return None, 1.0
    common, updates = leaf_updates(sums, ridge)
    if module.shared_width:
        _add(module.shared_down.data, common)
    for k, update in enumerate(updates):
        _add(module.leaf_down.data[k], update[:-1])
        _add(module.leaf_out_bias.data[k], update[-1])
    return ridge, errors[ridge]


def _features(module: Any, read: Tensor, missing: Tensor, leaf: int) -> tuple[Tensor, Tensor, Tensor]:
    shared = module.shared_activations(read).float()
    own = module.leaf_activations(read, leaf).float()
    return shared, torch.cat([own, own.new_ones(len(own), 1)], dim=1), missing


def fit_nodes(module: Any, read: Tensor, missing: Tensor, held: Tensor, ridges: Sequence[float]) -> tuple[Any, float]:
    """`fit_leaves` for the node form: one ridge regression on all neurons."""
    moments = Moments(int((~held).sum()), int(held.sum()))
    for judge in (False, True):
        rows = held == judge
        active = module.visited(read[rows]).flatten(1).float()
        moments.add(torch.cat([active, active.new_ones(len(active), 1)], dim=1), missing[rows], judge)
    update, ridge, error = best_update(moments.complete(), ridges)
    if update is not None:
        _add(module.node_down.data, update[:-1].view(module.node_down.shape))
        _add(module.out_bias.data, update[-1])
    return ridge, error


def _add(parameter: Tensor, update: Tensor) -> None:
    parameter.copy_((parameter.float() + update).to(parameter.dtype))


def readers(module: Any) -> list[Tensor]:
    """The rows [*, D] of a module that multiply what it reads, as views: hyperplanes and neurons."""
    names = ("router_weight", *(f"{g}_{k}" for g in ("shared", "leaf", "node") for k in ("gate", "up")))
    found = (getattr(module, name, None) for name in names)
    return [weight.data.view(-1, weight.shape[-1]) for weight in found if weight is not None]
