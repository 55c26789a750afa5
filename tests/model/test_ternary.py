"""Ternary maths: published errors of the rules, what is told apart, and codes that compensate."""

from __future__ import annotations

import pytest
import torch

from llmsurgeon.errors import SurgeryError
from llmsurgeon.model.ternary import (
    Grid,
    compensated,
    fitted_gain,
    grid_of,
    is_ternary,
    nearest,
    rounded,
    storable,
    taken_apart,
    values,
)

GRIDS = [Grid(), Grid(granularity="row"), Grid(granularity="group", group_size=64)]


def weight(outputs=96, inputs=256, seed=0):
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rule", "expected"), [("absmean", 0.264), ("least_squares", 0.213), ("threshold", 0.192)])
def test_relative_errors_of_gaussian_weights(rule, expected):
    w = weight(512, 512)
    error = (w - rounded(w, Grid(rule))).square().sum() / w.square().sum()
    assert error.item() == pytest.approx(expected, abs=2e-3)


def test_absmean_is_the_formula_of_bitnet():
    w = weight()
    scale = 1 / w.abs().mean()
    expected = (w * scale).round().clamp(-1, 1) / scale
    torch.testing.assert_close(rounded(w, Grid("absmean")), expected, rtol=1e-3, atol=0)  # a float16 scale


def test_rows_and_groups_are_tensors_of_their_own():
    w = weight(8, 128) * torch.arange(1, 9)[:, None]
    for grid, parts in ((GRIDS[1], [w[i : i + 1] for i in range(8)]), (GRIDS[2], w.view(16, 1, 64).unbind())):
        expected = torch.cat([rounded(part, Grid()) for part in parts]).view(8, 128)
        torch.testing.assert_close(rounded(w, grid), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.granularity)
def test_what_is_written_is_exactly_ternary_in_every_dtype(grid, dtype):
    made = rounded(weight().to(dtype) / 50, grid)
    assert made.dtype == dtype and is_ternary(made)
    found = grid_of(made)
    assert (found.granularity, found.group_size) == (grid.granularity, grid.group_size)
    codes, scale = taken_apart(made, found)
    assert set(codes.unique().tolist()) == {-1, 0, 1}
    assert torch.equal(values(codes, scale).to(dtype), made)
    assert torch.equal(scale.to(torch.float16).float(), scale), "GGUF keeps float16 scales"
    assert torch.equal(nearest(made.float(), scale), codes)


def test_others_are_told_apart():
    assert not is_ternary(weight()) and not is_ternary(torch.zeros(8, 64)) and not is_ternary(torch.ones(64))
    made = rounded(weight(), Grid())
    made[40, 3] *= 2
    assert not is_ternary(made)
    assert not is_ternary(weight().to("meta"))


def test_rounding_twice_shrinks_the_scale_of_absmean():
    """Why what is ternary is refused."""
    once = rounded(weight(), Grid("absmean"))
    assert rounded(once, Grid("absmean")).abs().max() < 0.8 * once.abs().max()


def test_tiny_scales_are_held_by_both_dtypes():
    scale = torch.logspace(-9, 4, 200)
    for dtype in (torch.bfloat16, torch.float32):
        made = storable(scale, dtype)
        assert torch.equal(made.to(torch.float16).float(), made) and torch.equal(made.to(dtype).float(), made)
    with pytest.raises(SurgeryError, match="beyond float16's range"):
        storable(torch.tensor([1e5]), torch.float32)


def test_groups_must_fit():
    with pytest.raises(SurgeryError, match="rows of 96 numbers are not whole groups of 64; group_size may be 32"):
        rounded(weight(8, 96), Grid(granularity="group", group_size=64))


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.granularity)
def test_codes_that_compensate_err_less(grid):
    mix = torch.randn(256, 256, generator=torch.Generator().manual_seed(1)) @ torch.diag(torch.logspace(0, -1.5, 256))
    inputs = weight(2048, 256, seed=2) @ mix
    w = weight()
    made, error, rounding = compensated(w, inputs.T @ inputs, grid, torch.bfloat16)
    assert made.dtype == torch.bfloat16 and is_ternary(made) and grid_of(made).granularity == grid.granularity
    assert error < 0.7 * rounding

    def measured(other):
        return ((inputs @ (w - other.float()).T).square().sum() / (inputs @ w.T).square().sum()).item()

    assert measured(made) == pytest.approx(error, rel=1e-3)
    assert measured(rounded(w.bfloat16(), grid)) == pytest.approx(rounding, rel=2e-2)


def test_white_inputs_leave_nothing_to_compensate():
    w = weight()
    _, error, rounding = compensated(w, 100 * torch.eye(256), Grid("threshold", "row"), torch.float32)
    assert error == pytest.approx(rounding, rel=2e-2) and error <= rounding


def test_dead_inputs_are_no_trouble():
    gram = torch.zeros(256, 256)
    gram[:4, :4] = torch.eye(4)
    made, error, rounding = compensated(weight(), gram, Grid(), torch.float32)
    assert torch.isfinite(made).all() and error <= rounding


def test_a_gain_fitted_to_codes_is_that_of_least_squares():
    torch.manual_seed(0)
    w, x = torch.randn(24, 12), torch.randn(200, 12) @ torch.randn(12, 12)
    codes = rounded(w, Grid())
    gram = x.T @ x
    error = (x @ (w - codes).T).square().sum() / (x @ w.T).square().sum()
    factors, left = fitted_gain(w, codes, gram, error.item(), ridge=1e-6)
    features = torch.stack([torch.outer(x[:, i], codes[:, i]).flatten() for i in range(12)], dim=1)
    expected = torch.linalg.lstsq(features, (x @ w.T).flatten()[:, None]).solution[:, 0]
    torch.testing.assert_close(factors, expected, rtol=1e-3, atol=1e-3)
    found = (x @ w.T - (x * factors) @ codes.T).square().sum() / (x @ w.T).square().sum()
    assert left == pytest.approx(found.item(), rel=1e-3) and left < error
    same, unchanged = fitted_gain(w, codes, gram, 0.0)
    assert unchanged == 0 and bool((same == 1).all())
