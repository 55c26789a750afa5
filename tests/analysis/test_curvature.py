"""What drawn gradients say a small change costs, against what it does cost."""

from __future__ import annotations

import pytest
import torch
from conftest import ENCODER_NAMES, tiny_encoder, tiny_model
from operations.helpers import some_tokens
from walk.test_backwards import ground_of

from llmsurgeon.analysis.curvature import drawn_gradients
from llmsurgeon.analysis.divergence import compared, divergences

DRAWS = 4000


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", *ENCODER_NAMES])
def test_the_mean_square_is_the_divergence_of_a_small_change(family):
    model = tiny_encoder(family) if family in ENCODER_NAMES else tiny_model(family)
    ground = ground_of(model, some_tokens(2, 16))
    left, runner = ground.scoring[-1], ground.runner
    moved = 0.03 * left.std() * torch.randn(left.shape, generator=torch.Generator().manual_seed(1))
    really = divergences(runner, (left + moved)[None], [len(left)], left)[0]
    drawn = drawn_gradients(runner, left, DRAWS)
    along = (drawn * moved).sum((-1, -2))
    foreseen = along.square().mean(0) / 2 / len(compared(16))
    # The mean of so many squares of about normal numbers is known to one part in sqrt(DRAWS / 2).
    assert torch.allclose(foreseen, really, rtol=5 * (2 / DRAWS) ** 0.5), (foreseen, really)
    assert torch.equal(drawn[:2], drawn_gradients(runner, left, DRAWS)[:2])
    other = torch.ones(16, dtype=torch.bool)
    other[compared(16)] = False
    assert not drawn[:, :, other].any() and drawn[:, :, compared(16)].any()


def test_a_state_of_zeros_has_no_direction():
    ground = ground_of(tiny_encoder("bert"), some_tokens(2, 16))
    left = ground.scoring[-1].clone()
    left[0, 8:] = 0
    drawn = drawn_gradients(ground.runner, left, 4)
    assert drawn.isfinite().all() and not drawn[:, 0, 8:].any()
