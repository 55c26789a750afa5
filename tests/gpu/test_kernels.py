"""Kernels on the card: what tests/kernels/test_triton.py asks of them in the interpreter, compiled; and trees."""

from __future__ import annotations

import copy

import pytest
import torch

from llmsurgeon.modeling import surgeon_fff as fff


@pytest.mark.parametrize("form", ["node", "leaf"])
@pytest.mark.parametrize("count", [0, 1, 7, 130])
@pytest.mark.parametrize("hidden", [24, 130, 768])
def test_trees_are_those_of_the_cpu(form, count, hidden, monkeypatch):
    torch.manual_seed(0)
    if form == "node":
        module = fff.NodeFeedForward(hidden, 3, "silu", True, True, trees=3)
    else:
        module = fff.LeafFeedForward(hidden, 3, "silu", True, True, leaf_width=9, shared=4)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.3)
    module = module.eval().requires_grad_(False)
    there = copy.deepcopy(module).cuda()
    x = torch.randn(count, 2 * hidden)[:, ::2]
    monkeypatch.setenv("LLMSURGEON_FFF_KERNEL", "torch")
    expected = module(x)
    monkeypatch.setenv("LLMSURGEON_FFF_KERNEL", "triton")
    found = there(x.cuda()).cpu()
    # A score that rounding can push over zero may send a token elsewhere.
    same = (found - expected).abs().amax(-1) <= 1e-3 * (1 + expected.abs().amax(-1))
    assert found.shape == expected.shape and same.float().mean() >= 0.95 if count else found.shape == expected.shape


def test_a_decode_step_is_one_graph():
    """What the kernels launch can be captured, and a replay computes it again."""
    kernels = pytest.importorskip("llmsurgeon.kernels.packed_triton")
    bits = torch.randint(0, 256, (64, 512), dtype=torch.uint8, device="cuda")
    bits = torch.where((bits & 0b10101010) & ((bits & 0b01010101) << 1) != 0, 0, bits)  # no code of 3
    scale = torch.rand(256, device="cuda")
    x = torch.randn(1, 512, device="cuda", dtype=torch.bfloat16)
    kernels.product(x, bits, scale)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = kernels.product(x, bits, scale)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(made, kernels.product(x, bits, scale))
