"""Gradients that are walked back a layer at a time are those of the whole model."""

from __future__ import annotations

import pytest
import torch
from conftest import ENCODER_NAMES, FAMILY_NAMES, MIXTURE_NAMES, tiny_encoder, tiny_model
from operations.helpers import some_tokens
from walk.test_walk import runner_of

from llmsurgeon.searching.ground import Ground
from llmsurgeon.text.sequences import Sequences
from llmsurgeon.walk.backwards import pulled_back


def ground_of(model, tokens):
    """The parent's streams over tokens, two sequences at a time."""
    fits = some_tokens(4, tokens.shape[1])
    return Ground.of(runner_of(model), Sequences(fits, ("text",) * len(fits)), tokens, batch=2)


@pytest.mark.parametrize("family", (*FAMILY_NAMES, *MIXTURE_NAMES, *ENCODER_NAMES))
def test_gradients_behind_each_layer_are_the_whole_models(family):
    model = tiny_encoder(family) if family in ENCODER_NAMES else tiny_model(family)
    tokens = some_tokens(4, 16)
    ground = ground_of(model, tokens)
    gradients = torch.randn(3, *ground.scoring.shape[1:], generator=torch.Generator().manual_seed(1))
    found = pulled_back(ground.runner, ground.scoring, ground.parts, gradients)
    left = []
    for layer in model.get_submodule(ground.runner.family.layers):
        layer.register_forward_hook(
            lambda _module, _inputs, output: left.append(output[0] if isinstance(output, tuple) else output)
        )
    model(input_ids=tokens)
    for number, gradient in enumerate(gradients):
        theirs = torch.autograd.grad(left[-1], left[:-1], gradient, retain_graph=True)
        for index, whole in enumerate(theirs):
            assert torch.allclose(found[index, number], whole, rtol=1e-3, atol=1e-5 * float(whole.abs().max()))
    assert torch.equal(found[-1], gradients)
