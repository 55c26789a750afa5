"""Ternary weights: codes -1, 0, 1 times a scale of the whole tensor, of each row, or of each group of a row's numbers.

Rules for codes and scale: absmean (BitNet b1.58, arXiv 2402.17764, eq. 1-3), the same codes with the scale of least
squares, and the threshold of ternary weight networks (arXiv 1605.04711, section 2.3). Codes that compensate each
other's errors on what the layer reads: GPTQ (arXiv 2210.17323, algorithm 1), with scales fitted anew in between.

Shapes: O outputs, I inputs, G groups of n numbers in a row. Scales are [O, G]; G is 1 but for groups, and the rows of
one tensor may share a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from llmsurgeon.errors import SurgeryError

Rule = Literal["absmean", "least_squares", "threshold"]
Granularity = Literal["tensor", "row", "group"]

# Groups are whole numbers of these, so that ternary weights can be told from others.
UNIT = 32
# Codes are nonzero from this share of mean |W| on, under the rule `threshold`.
THRESHOLD = 0.7
# Columns that GPTQ compensates at a time before it updates those that remain.
COLUMNS = 128
# Ridge on the diagonal of the inputs' covariance, as a multiple of its mean.
DAMPING = 0.01


@dataclass(frozen=True)
class Grid:
    """What shares a scale, and by which rule codes and scale are chosen."""

    rule: Rule = "least_squares"
    granularity: Granularity = "tensor"
    group_size: int | None = None

    def group(self, inputs: int) -> int:
        """Numbers of a row that share a scale.

        Raises:
            SurgeryError: rows of this length have no whole groups.
        """
        if self.granularity != "group":
            return inputs
        size = self.group_size or 0
        if size <= 0 or inputs % size:
            possible = [n for n in (1024, 512, 256, 128, 64, 32) if inputs % n == 0]
            raise SurgeryError(
                f"ternary: rows of {inputs} numbers are not whole groups of {size}; group_size may be "
                + (", ".join(map(str, possible)) if possible else "none here: take granularity row")
            )
        return size


def total(values_OGn: Tensor, grid: Grid) -> Tensor:
    """Sums over what shares a scale, [O, G]."""
    sums = values_OGn.sum(-1)
    return sums.sum().expand(len(sums), 1) if grid.granularity == "tensor" else sums


def grouped(weight_OI: Tensor, grid: Grid) -> Tensor:
    """[O, G, n]."""
    return weight_OI.reshape(len(weight_OI), -1, grid.group(weight_OI.shape[1]))


def ternarise(weight_OI: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Codes [O, I] in float32 and scales [O, G], by the grid's rule."""
    w = grouped(weight_OI.float(), grid)
    count = total(torch.ones_like(w), grid)
    mean = (total(w.abs(), grid) / count)[..., None]
    if grid.rule == "threshold":
        codes = torch.sign(w) * (w.abs() > THRESHOLD * mean)
    else:
        codes = torch.where(mean > 0, (w / mean).round(), 0).clamp(-1, 1)
    scale = mean[..., 0] if grid.rule == "absmean" else _ratio(total(w * codes, grid), total(codes.square(), grid))
    return codes.view(weight_OI.shape), scale


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below, 0)


def nearest(weight_OI: Tensor, scale_OG: Tensor) -> Tensor:
    """The codes under which codes * scale is nearest to the weight, [O, I] in float32."""
    w = weight_OI.reshape(*scale_OG.shape, -1)
    half = scale_OG[..., None] / 2
    return (torch.sign(w) * (w.abs() > half) * (half > 0)).view(weight_OI.shape)


def values(codes_OI: Tensor, scale_OG: Tensor) -> Tensor:
    """codes * scale, [O, I]."""
    return (codes_OI.view(*scale_OG.shape, -1) * scale_OG[..., None]).view(codes_OI.shape)


def storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale as both `dtype` and float16 hold it: GGUF keeps a float16 with each block of codes.

    Raises:
        SurgeryError: it is beyond float16's range.
    """
    if scale.numel() and scale.abs().max() > torch.finfo(torch.float16).max:
        raise SurgeryError(f"ternary: a scale of {scale.abs().max():.3g} is beyond float16's range")
    return scale.to(torch.float16).to(dtype).to(scale.dtype)


def rounded(weight_OI: Tensor, grid: Grid) -> Tensor:
    """The weight with ternary values, in its own dtype, without data to fit it to."""
    grid.group(weight_OI.shape[1])
    if weight_OI.is_meta:
        return torch.empty_like(weight_OI)
    codes, scale = ternarise(weight_OI, grid)
    return values(codes, storable(scale, weight_OI.dtype)).to(weight_OI.dtype)


def is_ternary(weight: Tensor) -> bool:
    """True where of every 32 neighbours of a row those that are not zero have one magnitude, and some are not zero."""
    if weight.dim() != 2 or weight.is_meta or weight.shape[1] < 8 or not weight.is_floating_point():
        return False
    for rows in (weight[:4], weight):  # most weights are told by a few rows
        sizes = torch.nn.functional.pad(rows.detach().abs(), (0, -rows.shape[1] % UNIT)).view(len(rows), -1, UNIT)
        if not bool(((sizes == 0) | (sizes == sizes.amax(-1, keepdim=True))).all()):
            return False
    return bool(weight.any())


def grid_of(weight_OI: Tensor) -> Grid:
    """What shares a scale in a ternary weight."""
    sizes = weight_OI.detach().abs()
    inputs = sizes.shape[1]
    if bool(((sizes == 0) | (sizes == sizes.max())).all()):
        return Grid(granularity="tensor")
    sizes_that_fit = [inputs, *(n for n in range(inputs // UNIT * UNIT, UNIT, -UNIT) if inputs % n == 0)]
    for size in sizes_that_fit:
        parts = sizes.view(len(sizes), -1, size)
        if bool(((parts == 0) | (parts == parts.amax(-1, keepdim=True))).all()):
            return Grid(granularity="row") if size == inputs else Grid(granularity="group", group_size=size)
    return Grid(granularity="group", group_size=UNIT)


def taken_apart(weight_OI: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """(codes [O, I], scales [O, G]) of a ternary weight, float32."""
    w = grouped(weight_OI.detach().float(), grid)
    scale = w.abs().amax(-1)
    if grid.granularity == "tensor":
        scale = scale.max().expand(len(scale), 1)
    return torch.sign(w).view(weight_OI.shape), scale


def compensated(
    weight_OI: Tensor, gram_II: Tensor, grid: Grid, dtype: torch.dtype, rounds: int = 3
) -> tuple[Tensor, float, float]:
    """The ternary weight that changes least of what the layer gives: (weight [O, I] in `dtype`, error, by rounding).

    Columns are rounded one after the other, those that carry most first, and what each errs is made up for by the
    columns that remain. Scales are then fitted to the codes by least squares and the columns done again; of
    `rounds` the best counts.

    Args:
        gram_II: X^T X of what the layer reads.
        dtype: what the weight is stored in; scales are chosen among its numbers.

    Errors are ||X (W - W')||^2 relative to ||X W||^2; the last is that of `rounded`.
    """
    w = weight_OI.float()
    codes, scale = ternarise(w, grid)
    plain = values(codes, storable(scale, dtype))
    reference = _spread(w, gram_II)
    by_rounding = _spread(w - plain, gram_II) / max(reference, 1e-30)
    best, error = plain, by_rounding
    order = gram_II.diagonal().argsort(descending=True)
    factor = _inverse_factor(gram_II[order[:, None], order[None]])
    scale = storable(_fitted_scale(w, codes, gram_II, grid), dtype)
    for _ in range(rounds):
        codes = _codes_in_order(w, scale, factor, order)
        scale = storable(_fitted_scale(w, codes, gram_II, grid), dtype)
        found = values(codes, scale)
        left = _spread(w - found, gram_II) / max(reference, 1e-30)
        if left < error:
            best, error = found, left
    return best.to(dtype), error, by_rounding


def fitted_gain(
    weight_OI: Tensor, ternary_OI: Tensor, gram_II: Tensor, error: float, ridge: float = DAMPING
) -> tuple[Tensor, float]:
    """Factors [I] on what a ternary weight reads, under which it gives most nearly what `weight` gives without them.

    Least squares, argmin over g of ||X W^T - X diag(g) T^T||^2, held to 1 by a ridge (a multiple of the system's mean
    diagonal). Returns them with the error that is left, relative to ||X W^T||^2; all 1 where that is not below `error`.
    """
    w, t = weight_OI.float(), ternary_OI.float()
    system = gram_II * (t.T @ t)
    missing = ((gram_II @ (w - t).T) * t.T).sum(1)
    damped = system.clone()
    damped.diagonal().add_((ridge * system.diagonal().mean()).clamp_min(1e-20))
    factors = 1 + torch.linalg.solve(damped, missing)
    left = _spread(w - t * factors, gram_II) / max(_spread(w, gram_II), 1e-30)
    return (factors, left) if left < error else (torch.ones_like(factors), error)


def put_in_place(model: nn.Module, path: str, module: nn.Module) -> None:
    """Set the module at `path`; what is hooked before the one that was there (a norm on its input) stays hooked."""
    module._forward_pre_hooks = model.get_submodule(path)._forward_pre_hooks
    model.set_submodule(path, module)


def _spread(weight_OI: Tensor, gram_II: Tensor) -> float:
    """||X W^T||^2."""
    return float((weight_OI * (weight_OI @ gram_II)).sum())


def _inverse_factor(gram_II: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped covariance's inverse."""
    damping = DAMPING
    while True:
        damped = gram_II.clone()
        damped.diagonal().add_((damping * gram_II.diagonal().mean()).clamp_min(1e-12))
        factor, failed = torch.linalg.cholesky_ex(damped)
        del damped  # each is as large as the Gram matrix
        if not failed.item():
            inverse = torch.cholesky_inverse(factor)
            del factor
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            del inverse
            if not failed.item():
                return upper
        damping *= 10  # rounding in the float32 sums outweighed the ridge


def _codes_in_order(weight_OI: Tensor, scale_OG: Tensor, factor_II: Tensor, order_I: Tensor) -> Tensor:
    """Codes [O, I], chosen column after column in `order`; the columns that remain make up for each one's error."""
    inputs = weight_OI.shape[1]
    left = weight_OI[:, order_I].clone()
    scale = scale_OG.repeat_interleave(inputs // scale_OG.shape[1], dim=1)[:, order_I]
    codes = torch.empty_like(left)
    for start in range(0, inputs, COLUMNS):
        stop = min(start + COLUMNS, inputs)
        errors = torch.empty_like(left[:, start:stop])
        for column in range(start, stop):
            w, s = left[:, column], scale[:, column]
            code = torch.sign(w) * (w.abs() > s / 2) * (s > 0)
            error = (w - code * s) / factor_II[column, column]
            left[:, column + 1 : stop] -= torch.outer(error, factor_II[column, column + 1 : stop])
            codes[:, column], errors[:, column - start] = code, error
        left[:, stop:] -= errors @ factor_II[start:stop, stop:]
    return codes[:, order_I.argsort()]


def _fitted_scale(weight_OI: Tensor, codes_OI: Tensor, gram_II: Tensor, grid: Grid) -> Tensor:
    """argmin over scales [O, G] of ||X (W - codes * scale)||^2; no scale is negative."""
    wanted = total(grouped(codes_OI * (weight_OI @ gram_II), grid), grid)
    if grid.granularity != "group" or wanted.shape[1] == 1:
        return _ratio(wanted, total(grouped(codes_OI * (codes_OI @ gram_II), grid), grid)).clamp_min(0)
    codes = grouped(codes_OI, grid)
    outputs, groups, size = codes.shape
    system = torch.empty(outputs, groups, groups)
    for g in range(groups):
        reach = codes[:, g] @ gram_II[g * size : (g + 1) * size]
        system[:, g] = (reach.view(outputs, groups, size) * codes).sum(-1)
    diagonal = system.diagonal(dim1=1, dim2=2)
    diagonal += 1e-4 * diagonal.mean(1, keepdim=True) + 1e-12
    return torch.linalg.solve(system, wanted).clamp_min(0)
