"""Ridge regression from sums and from the tokens themselves, against the slow solution in float64."""

from __future__ import annotations

import pytest
import torch

from llmsurgeon.healing.refit.ridge import Moments, Rows, Sums, best_update, joint_update
from llmsurgeon.healing.refit.symmetric import add_gram, units_of
from llmsurgeon.operations.fit_memory import fits_in_dual, judges_as_rows

RIDGES = (0.03, 0.1, 0.3, 1.0)


def text(tokens, features, outputs, dtype=torch.bfloat16, seed=0):
    """Features of very different sizes, as activations are, and what depends on them."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(features, generator=generator).square() + 0.01
    a = (torch.randn(tokens, features, generator=generator) * scale).to(dtype)
    x = torch.randn(features, outputs, generator=torch.Generator().manual_seed(9))
    return a, a.float() @ x + torch.randn(tokens, outputs, generator=generator)


def slow(a, r, ridge):
    """The ridge solution in float64."""
    gram = a.double().T @ a.double()
    damped = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    return torch.linalg.solve(damped, a.double().T @ r.double())


def moments_of(fit, judge, known=True, parts=3):
    moments = Moments(len(fit[0]), len(judge[0])) if known else Moments()
    for (a, r), held in ((fit, False), (judge, True)):
        for features, missing in zip(a.chunk(parts), r.chunk(parts), strict=True):
            moments.add(features, missing, held)
    return moments.complete()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("fitting", "judging", "kept"), [(200, 40, (Rows, Rows)), (900, 120, (Sums, Rows)), (900, 700, (Sums, Sums))]
)
def test_the_best_update_is_that_of_the_slow_solution(fitting, judging, kept, dtype):
    fit, judge = text(fitting, 600, 5, dtype), text(judging, 600, 5, dtype, seed=1)
    moments = moments_of(fit, judge)
    assert (type(moments.fits), type(moments.judges)) == kept
    solutions = {ridge: slow(*fit, ridge) for ridge in RIDGES}
    errors = {
        ridge: float((judge[1].double() - judge[0].double() @ found).square().sum() / judge[1].double().square().sum())
        for ridge, found in solutions.items()
    }
    update, ridge, error = best_update(moments, RIDGES)
    assert ridge == min(errors, key=errors.get) and error == pytest.approx(errors[ridge], rel=1e-5)
    assert (update.double() - solutions[ridge]).norm() < 1e-5 * solutions[ridge].norm()
    for each in RIDGES:
        assert (moments.fits.update(each).double() - solutions[each]).norm() < 1e-5 * solutions[each].norm()
        assert moments.held_out_error(moments.fits.update(each)) == pytest.approx(errors[each], rel=1e-5)


def test_fewer_tokens_may_come_than_were_announced():
    """Padding is left out."""
    fit, judge = text(200, 600, 5), text(40, 600, 5, seed=1)
    announced = Moments(300, 90)
    for (a, r), held in ((fit, False), (judge, True)):
        announced.add(a, r, held)
    update, ridge, error = best_update(announced.complete(), RIDGES)
    expected, same, as_good = best_update(moments_of(fit, judge, parts=1), RIDGES)
    assert (ridge, error) == (same, pytest.approx(as_good))
    torch.testing.assert_close(update, expected)


def test_the_joint_update_of_kept_tokens_is_that_of_their_sums():
    fit, judge = text(200, 600, 5), text(40, 600, 5, seed=1)
    kept, summed = moments_of(fit, judge), moments_of(fit, judge, known=False)
    assert isinstance(kept.fits, Rows) and isinstance(summed.fits, Sums)
    (own, error), (expected, as_good) = (joint_update(each, 0.3, (100, 500)) for each in (kept, summed))
    assert own.shape == (100, 5) and error == pytest.approx(as_good, rel=1e-5)
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


def test_products_of_bfloat16_numbers_are_summed_in_float32():
    """The units for bfloat16 round nothing; where there are none, nothing differs. The setting is as it was."""
    a, _ = text(700, 600, 1)
    before = torch.get_float32_matmul_precision()
    gram = torch.zeros(600, 600)
    add_gram(gram, a)
    exact = a.double().T @ a.double()
    assert (gram.triu().double() - exact.triu()).norm() < 1e-6 * exact.norm()
    with pytest.raises(ZeroDivisionError), units_of(torch.bfloat16):
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == before
    with units_of(torch.float32):
        assert torch.get_float32_matmul_precision() == before


def test_where_the_line_between_tokens_and_sums_lies():
    """What is kept is never larger than Gram matrices."""
    for features in (100, 896, 14592):
        for tokens in range(1, 2 * features, 7):
            if fits_in_dual(tokens, features):
                assert tokens * features + tokens**2 <= features**2
            if judges_as_rows(tokens, features):
                assert tokens * features <= features**2
    assert fits_in_dual(3584, 14592) and not fits_in_dual(14336, 14592)
    assert judges_as_rows(2048, 14592) and not judges_as_rows(2048, 896)


def test_a_large_matrix_has_pages_of_its_own(monkeypatch):
    monkeypatch.setattr("llmsurgeon.healing.refit.symmetric.OWN_PAGES", 1)
    fit, judge = text(900, 60, 5), text(40, 60, 5, seed=1)
    update, ridge, _ = best_update(moments_of(fit, judge), RIDGES)
    assert (update.double() - slow(*fit, ridge)).norm() < 1e-5 * update.norm()
