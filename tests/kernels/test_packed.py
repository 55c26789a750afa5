"""Packed linears in a loaded model compute what the plain ones do, by the kernel and by unpacking."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model
from generation import generate
from operations.helpers import logits, operate, some_tokens
from torch import nn

from llmsurgeon.kernels import packed
from llmsurgeon.kernels.packed import PackedLinear, pack_linears, resident_bytes
from llmsurgeon.model.ternary import Grid, rounded, taken_apart
from llmsurgeon.operations.ternary import Ternary

TENSOR = Grid()


@pytest.fixture(params=["kernel", "without numba"])
def kernel(request, monkeypatch):
    if request.param == "kernel":
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(packed, "_kernels", lambda: None)


def linear(grid=TENSOR, outputs=48, inputs=100, dtype=torch.float32, bias=True):
    made = nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
    made.weight.data = rounded(torch.randn(outputs, inputs).to(dtype), grid)
    codes, scale = taken_apart(made.weight, grid)
    return made, PackedLinear(codes, scale[:, 0], made.bias, dtype)


@pytest.mark.parametrize("grid", [Grid(), Grid(granularity="row")], ids=["tensor", "row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("bias", [True, False])
def test_one_linear(kernel, grid, dtype, tokens, bias):
    torch.manual_seed(0)
    plain, made = linear(grid, dtype=dtype, bias=bias)
    x = torch.randn(2, tokens, 100).to(dtype)
    with torch.no_grad():
        found, expected = made(x), plain(x)
    assert found.dtype == dtype
    error = {torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(found, expected, atol=error, rtol=error)


def test_threads_compute_the_same(monkeypatch):
    numba_kernel = pytest.importorskip("llmsurgeon.kernels.packed_numba")
    _, made = linear()
    x = torch.randn(7, 100).numpy()
    one = numba_kernel.product(x, made.bits.numpy(), 1)
    monkeypatch.setattr(numba_kernel, "THREADED_FROM", 0)
    assert (numba_kernel.product(x, made.bits.numpy(), 2) == one).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", [Grid(), Grid(granularity="row")], ids=["tensor", "row"])
def test_weights_are_unpacked_or_not(monkeypatch, dtype, grid):
    numba_kernel = pytest.importorskip("llmsurgeon.kernels.packed_numba")
    torch.manual_seed(0)
    plain, made = linear(grid, dtype=dtype)
    x = torch.randn(19, 100).to(dtype)
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    with torch.no_grad():
        expected = plain(x)
        monkeypatch.setattr(packed, "DECODED", {dtype: 0})
        torch.testing.assert_close(made(x), expected, **near)
        monkeypatch.setattr(packed, "DECODED", {dtype: 20})
        torch.testing.assert_close(made(x), expected, **near)
    kind = packed.INTEGER.get(dtype, dtype)
    for threads in (1, 2):
        monkeypatch.setattr(numba_kernel, "THREADED_FROM", 0 if threads == 2 else 1 << 30)
        found, sizes = torch.empty(4, 12, 100, dtype=dtype), made.scale.to(dtype).view(4, 12)
        numba_kernel.unpack(made.bits.numpy(), sizes.view(kind).numpy(), found.view(kind).numpy(), threads)
        assert torch.equal(found.view(48, 100), plain.weight.detach())
    assert packed.scratch_bytes() >= 48 * 100 * dtype.itemsize


def test_gradients_reach_what_is_read():
    plain, made = linear()
    x = torch.randn(40, 100)
    grads = []
    for module in (plain, made):
        given = x.clone().requires_grad_()
        module(given).square().sum().backward()
        grads.append(given.grad)
    torch.testing.assert_close(*grads, atol=1e-3, rtol=1e-3)


def test_a_model(kernel):
    model, _, _ = operate(tiny_model("llama"), Ternary(method="round", layers=(1, 3)))
    tokens, expected, before = some_tokens(), logits(model, some_tokens()), resident_bytes(model)
    names = pack_linears(model)
    assert len(names) == 14 and all(".1." in name or ".3." in name for name in names)
    torch.testing.assert_close(logits(model, tokens), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(model, tokens[:1, :3]), expected[:1, :3], atol=1e-4, rtol=1e-4)
    numbers = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 96)
    outputs = 2 * (32 + 16 + 16 + 32 + 96 + 96 + 32)
    assert resident_bytes(model) == before - 4 * numbers + numbers // 4 + 4 * outputs
    prompt = tokens[:1, :5]
    generate(model, prompt, max_new_tokens=4)


def test_groups_and_odd_shapes_stay_as_they_are():
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(64, 6), nn.Linear(64, 8))
    model[0].weight.data = rounded(torch.randn(8, 64), Grid(granularity="group", group_size=32))
    model[1].weight.data = rounded(torch.randn(6, 64), Grid())
    assert pack_linears(model) == ()
