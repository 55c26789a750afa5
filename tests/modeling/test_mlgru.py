"""The MLGRU and the BitLinear as modules: each form against the slow obvious one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llmsurgeon.modeling import surgeon_mlgru as mlgru
from llmsurgeon.modeling.surgeon_versions import CACHE_NAMES

ENTRY = {"width": 12, "in_bias": True, "out_bias": False, "linears": "float"}


def mixer(seed=0, **changes):
    torch.manual_seed(seed)
    module = mlgru.MLGRU(8, {**ENTRY, **changes}, 1e-6)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.7)
    module.layer_idx = 0
    return module.eval()


def token_by_token(keep, write, start):
    states = []
    for t in range(keep.shape[1]):
        start = keep[:, t] * start + write[:, t]
        states.append(start)
    return torch.stack(states, dim=1)


class OneSlot:
    """A cache of one layer."""

    def __init__(self):
        self.layers = [mlgru.MLGRUState()]


@settings(deadline=None, max_examples=30)
@given(tokens=st.integers(1, 70), batch=st.integers(1, 3), seed=st.integers(0, 9))
def test_the_scan_is_the_recurrence(tokens, batch, seed):
    generator = torch.Generator().manual_seed(seed)
    keep = torch.sigmoid(4 * torch.randn(batch, tokens, 5, generator=generator))
    write, start = torch.randn(batch, tokens, 5, generator=generator), torch.randn(batch, 5, generator=generator)
    found = mlgru.linear_recurrence(keep, write, start)
    torch.testing.assert_close(found, token_by_token(keep, write, start), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1.0])
def test_extreme_factors_over_a_long_text_stay_finite(factor):
    keep = torch.full((1, 3000, 2), factor)
    write = torch.ones(1, 3000, 2)
    found = mlgru.linear_recurrence(keep, write, torch.zeros(1, 2))
    assert torch.isfinite(found).all()
    assert found[0, -1, 0] == pytest.approx(3000 if factor == 1 else 1)


def test_gradients_of_the_scan():
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(2, 11, 3, generator=generator, dtype=torch.double).requires_grad_()
    write = torch.randn(2, 11, 3, generator=generator, dtype=torch.double).requires_grad_()
    start = torch.randn(2, 3, generator=generator, dtype=torch.double).requires_grad_()
    assert torch.autograd.gradcheck(mlgru.linear_recurrence, (keep, write, start))


def test_the_mixer_is_its_equations():
    module, x = mixer(), torch.randn(1, 9, 8)
    low = torch.sigmoid(module.lower_bound)
    keep = low + (1 - low) * torch.sigmoid(module.f_proj(x))
    states = token_by_token(keep, (1 - keep) * F.silu(module.i_proj(x)), torch.zeros(1, 12))
    expected = module.o_proj(torch.sigmoid(module.g_proj(x)) * states)
    torch.testing.assert_close(module(x)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("cuts", [(1,) * 10, (4, 1, 5), (9, 1)])
def test_in_pieces_with_a_cache_as_in_one(cuts, name):
    module, x, cache = mixer(), torch.randn(2, 10, 8), OneSlot()
    pieces, at = [], 0
    for size in cuts:
        pieces.append(module(x[:, at : at + size], **{name: cache}, use_cache=True)[0])
        at += size
    torch.testing.assert_close(torch.cat(pieces, dim=1), module(x)[0], atol=1e-5, rtol=1e-5)
    assert cache.layers[0].get_seq_length() == 10 and cache.layers[0].state.shape == (2, 12)


def test_padding_leaves_the_state_as_it_was():
    module, x = mixer(), torch.randn(1, 6, 8)
    padded = torch.cat([torch.randn(1, 3, 8), x], dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    mine, theirs = OneSlot(), OneSlot()
    found = module(padded, cache=mine, token_mask=mask)[0][:, 3:]
    torch.testing.assert_close(found, module(x, cache=theirs)[0])
    torch.testing.assert_close(mine.layers[0].state, theirs.layers[0].state)
    after = module(torch.cat([x, padded[:, :3]], dim=1), cache=(right := OneSlot()), token_mask=mask.flip(1))
    assert after[0].shape == (1, 9, 8)
    torch.testing.assert_close(right.layers[0].state, theirs.layers[0].state)


def test_states_are_float32_in_a_bfloat16_model():
    module, cache = mixer().bfloat16(), OneSlot()
    output, _ = module(torch.randn(1, 5, 8, dtype=torch.bfloat16), cache=cache)
    assert output.dtype == torch.bfloat16 and cache.layers[0].state.dtype == torch.float32


def test_what_a_cache_layer_is_asked():
    layer = mlgru.MLGRUState(max_cache_len=4)
    assert layer.get_mask_sizes(3) == (3, 0) and layer.get_max_length() == -1 and not layer.has_previous_state[0]
    layer.reorder_cache(torch.tensor([0]))
    layer.advance(torch.tensor([[1.0], [2.0]]), 5)
    layer.reorder_cache(torch.tensor([1, 1]))
    assert layer.state.tolist() == [[2.0], [2.0]] and layer.get_mask_sizes(2) == (7, 0)
    layer.batch_repeat_interleave(2)
    assert layer.state.shape == (4, 1)
    layer.crop(0)
    with pytest.raises(RuntimeError, match="take tokens back"):
        layer.crop(-1)
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.recurrent_states == {0: None}


def test_a_cache_that_was_not_made_for_the_model():
    from transformers import DynamicCache

    with pytest.raises(ValueError, match="make the cache for the model"):
        mixer()(torch.randn(1, 2, 8), cache=DynamicCache())


def test_a_call_that_it_does_not_understand():
    module, x = mixer(), torch.randn(1, 2, 8)
    with pytest.raises(TypeError, match="MLGRU was handed an argument that it does not understand: 'memory'"):
        module(x, memory=OneSlot())
    with pytest.raises(TypeError, match=r"use_cache=True and no cache under a name that it knows \(cache, past_key"):
        module(x, use_cache=True)
    with pytest.raises(TypeError, match="two caches, 'cache' and 'layer_past'"):
        module(x, cache=OneSlot(), layer_past=OneSlot())
    module(x, memory=None, cache=None, attention_mask=torch.ones(1, 2), use_cache=False)


def bit(seed=0, bias=True):
    torch.manual_seed(seed)
    layer = mlgru.BitLinear(16, 6, bias, 1e-6)
    layer.gain.data.normal_(1, 0.3)
    return layer.train()


def test_ternary_weights_and_eight_bit_activations():
    weight = torch.randn(6, 16)
    scale = weight.abs().mean()
    rounded = mlgru.ternary(weight)
    torch.testing.assert_close(rounded, (weight / scale).round().clamp(-1, 1) * scale)
    assert len(rounded.unique()) == 3
    codes, step = mlgru.eight_bits(torch.randn(5, 16))
    assert codes.abs().amax(-1).tolist() == [127] * 5 and torch.equal(codes, codes.round()) and step.shape == (5, 1)
    assert not mlgru.ternary(torch.zeros(2, 2)).any() and not mlgru.eight_bits(torch.zeros(1, 4))[0].any()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("bias", [True, False])
def test_fused_equals_unfused(share, bias):
    layer, x = bit(bias=bias), torch.randn(3, 7, 16)
    layer.share = share
    found = []
    for fused in (True, False):
        layer.fused = fused
        layer.zero_grad()
        given_x = x.clone().requires_grad_()
        output = layer(given_x)
        (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
        found.append((output.detach(), given_x.grad, *(p.grad.clone() for p in layer.parameters())))
    (mine, *gradients), (theirs, *wanted) = found
    assert torch.equal(mine, theirs)
    for gradient, expected in zip(gradients, wanted, strict=True):
        assert (gradient - expected).norm() < 0.01 * expected.norm() + 1e-6


def test_without_rounding_it_is_a_norm_and_a_linear_layer():
    layer, x = bit(), torch.randn(4, 16)
    layer.share = 0.0
    expected = F.linear(F.rms_norm(x, (16,), layer.gain, layer.eps), layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    # Whatever the schedule says, what a trained model computes is ternary.
    layer.eval()
    codes, step = mlgru.eight_bits(F.rms_norm(x, (16,), layer.gain, layer.eps))
    torch.testing.assert_close(layer(x), F.linear(codes * step, mlgru.ternary(layer.weight), layer.bias))


def test_the_fused_form_keeps_a_byte_an_activation():
    layer, x = bit(), torch.randn(32, 16, requires_grad=True)
    kept = {}
    for fused in (True, False):
        layer.fused, sizes = fused, {}

        def note(tensor, sizes=sizes):
            sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            layer(x)
        own = {p.data_ptr() for p in (x, *layer.parameters())}
        kept[fused] = sum(size for pointer, size in sizes.items() if pointer not in own)
    assert kept[True] <= 32 * 16 + 2 * 32 * 4 and kept[False] > 3 * kept[True]


def test_a_closed_gain_has_a_finite_gradient():
    layer, x = bit(), torch.randn(4, 16, requires_grad=True)
    layer.gain.data[3] = 0
    layer(x).square().sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in (x, *layer.parameters()))


def test_under_autocast():
    layer, x = bit(), torch.randn(4, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    output.float().square().sum().backward()
    assert output.dtype == torch.bfloat16 and layer.weight.grad.dtype == torch.float32 and x.grad.abs().sum() > 0


def test_a_mixer_of_bit_linears_learns():
    module, x = mixer(linears="ternary").train(), torch.randn(2, 5, 8)
    module(x)[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
