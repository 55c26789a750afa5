"""Trees as modules: soft against hard, and every kernel against the slow obvious walk."""

from __future__ import annotations

import copy
import math
import os
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmsurgeon.modeling import surgeon_fff as fff

ACTIVATIONS = tuple(fff.COMPILED_ACTIVATIONS)


def leaf_form(depth=3, hidden=24, leaf_width=5, shared=4, activation="gelu", gated=False, bias=True, seed=0):
    torch.manual_seed(seed)
    module = fff.LeafFeedForward(hidden, depth, activation, gated, bias, leaf_width=leaf_width, shared=shared)
    return randomised(module)


def node_form(depth=3, hidden=24, trees=3, activation="gelu", gated=False, bias=True, seed=0):
    torch.manual_seed(seed)
    return randomised(fff.NodeFeedForward(hidden, depth, activation, gated, bias, trees=trees))


def randomised(module):
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.3)
    return module.eval()


def neuron(module, group, at, x):
    """(branch, activation) of one neuron for one token, in float64."""
    part = {k: getattr(module, f"{group}_{k}", None) for k in ("gate", "up", "gate_bias", "up_bias")}
    score = {
        k: (part[k][at].double() @ x) + (0 if part[f"{k}_bias"] is None else part[f"{k}_bias"][at].double())
        for k in ("gate", "up")
        if part[k] is not None
    }
    branch = score.get("gate", score["up"])
    act = module.act_fn(branch)
    return branch, act * score["up"] if "gate" in score else act


def slowly(module, x):
    """One token, one neuron at a time: (output [D] in float64, smallest |score| of a decision)."""
    x, margin = x.double(), math.inf
    if isinstance(module, fff.LeafFeedForward):
        node = 0
        for _ in range(module.depth):
            score = module.router_weight[node].double() @ x + module.router_bias[node].double()
            margin = min(margin, abs(score.item()))
            node = 2 * node + 1 + int(score >= 0)
        leaf = node - (module.leaves - 1)
        y = module.leaf_out_bias[leaf].double().clone()
        for i in range(module.shared_width):
            y += neuron(module, "shared", i, x)[1] * module.shared_down[i].double()
        for i in range(module.leaf_width):
            y += neuron(module, "leaf", (leaf, i), x)[1] * module.leaf_down[leaf, i].double()
        return y, margin
    y = module.out_bias.double().clone()
    for tree in range(module.trees):
        node = 0
        for level in range(module.depth + 1):
            branch, active = neuron(module, "node", (tree, node), x)
            y += active * module.node_down[tree, node].double()
            margin = min(margin, abs(branch.item())) if level < module.depth else margin
            node = 2 * node + 1 + int(branch > 0)
    return y, margin


def hard(module, x, kernel):
    os.environ["LLMSURGEON_FFF_KERNEL"] = kernel
    try:
        with torch.no_grad():
            return module(x)
    finally:
        del os.environ["LLMSURGEON_FFF_KERNEL"]


def kernels():
    found = ["torch"]
    for name in ("numba", "triton"):
        if fff.installed(name) and (name == "numba" or os.environ.get("TRITON_INTERPRET") == "1"):
            found.append(name)
    return found


@settings(max_examples=40, deadline=None)
@given(
    leaf=st.booleans(),
    depth=st.integers(0, 5),
    hidden=st.sampled_from([3, 16, 64, 100, 130]),
    count=st.sampled_from([1, 2, 15, 16, 17, 33, 63, 64, 70]),
    width=st.integers(1, 9),
    extra=st.integers(0, 4),
    activation=st.sampled_from(ACTIVATIONS),
    gated=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_all_kernels_are_the_slow_walk(leaf, depth, hidden, count, width, extra, activation, gated, bias, dtype, seed):
    sizes = {"depth": depth, "hidden": hidden, "activation": activation, "gated": gated, "bias": bias, "seed": seed}
    module = leaf_form(leaf_width=width, shared=extra, **sizes) if leaf else node_form(trees=1 + extra, **sizes)
    module = module.to(dtype)
    x = torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed)).to(dtype)
    with torch.no_grad():
        walked = [slowly(module, token) for token in x]
    # A score that rounding can push over zero may send a token elsewhere.
    sure = torch.tensor([margin > 1e-3 * hidden**0.5 for _, margin in walked])
    expected = torch.stack([y for y, _ in walked])
    close = 1e-4 if dtype == torch.float32 else 4e-2
    for kernel in kernels():
        found = hard(module, x, kernel).double()
        error = (found - expected).abs().amax(1) / (1 + expected.abs().amax(1))
        assert error[sure].le(close).all(), (kernel, error[sure].max())


@pytest.mark.parametrize("kernel", ["torch", "numba"])
def test_many_tokens_are_sorted_and_come_back_in_order(kernel):
    """The gathering, the sorting and the grouped paths: a deep tree, a shallow one and leaves, a thousand tokens."""
    if kernel not in kernels():
        pytest.skip(f"{kernel} is not installed")
    x = torch.randn(1000, 24, generator=torch.Generator().manual_seed(3))
    for module in (node_form(depth=8, trees=1), node_form(depth=1, trees=20), leaf_form(depth=4), leaf_form(depth=7)):
        one_by_one = torch.cat([hard(module, token[None], "torch") for token in x])
        torch.testing.assert_close(hard(module, x, kernel), one_by_one, atol=2e-5, rtol=1e-4)
        several = x.view(10, 100, 24)
        torch.testing.assert_close(hard(module, several, kernel).view(1000, 24), one_by_one, atol=2e-5, rtol=1e-4)
        assert hard(module, x[:0], kernel).shape == (0, 24)


def test_paths_longer_than_a_vector():
    """17 neurons a path, one more than fit a vector register."""
    if "numba" not in kernels():
        pytest.skip("numba is not installed")
    for gated in (False, True):
        module = node_form(depth=16, hidden=3, trees=1, gated=gated)
        x = torch.randn(70, 3, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(hard(module, x, "numba"), hard(module, x, "torch"), **CLOSE)
        torch.testing.assert_close(hard(module, x[:5], "numba"), hard(module, x[:5], "torch"), **CLOSE)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_compiled_activations_are_those_of_transformers(activation):
    kernel = pytest.importorskip("llmsurgeon.modeling.surgeon_fff_numba", exc_type=RuntimeError)
    z = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e4, -100.0, -0.0, 100.0, 1e4, 1e30, math.nan])])
    row = torch.zeros(1, math.ceil(len(z) / kernel.LANES) * kernel.LANES)
    row[0, : len(z)] = z
    kind = kernel.ACTIVATIONS[fff.COMPILED_ACTIVATIONS[activation]]
    kernel.activate(kind, row.numpy(), 0, row[:0].numpy())
    expected = fff.ACT2FN[activation](z.double()).float()
    torch.testing.assert_close(row[0, : len(z)], expected, atol=2e-6, rtol=1e-6, equal_nan=True)


def test_prepared_calls_follow_the_module():
    """What the compiled kernel prepared is dropped where weights move, and not used where it does not apply."""
    if "numba" not in kernels():
        pytest.skip("numba is not installed")
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(3))
    module = node_form(depth=8, trees=2)

    def agrees(module, x, **close):
        torch.testing.assert_close(hard(module, x, "numba"), hard(module, x, "torch"), **close or CLOSE)

    agrees(module, x)
    assert module._shortcut.found is not None
    agrees(module, x)
    agrees(module, x.view(1, 5, 24))
    agrees(module, x.T.contiguous().T)
    module.node_up.data.mul_(2)
    agrees(module, x)
    module.load_state_dict({k: v.flip(0) for k, v in module.state_dict().items()}, assign=True)
    agrees(module, x)
    twin = copy.deepcopy(module)
    assert twin._shortcut.found is None
    agrees(pickle.loads(pickle.dumps(twin)), x)
    agrees(module.to(torch.bfloat16), x.bfloat16(), atol=3e-2, rtol=3e-2)
    agrees(module.float(), x)
    learned = module(x.requires_grad_())
    assert learned.requires_grad
    soft = module.train()(x)
    assert not torch.allclose(soft, learned)


CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.mark.parametrize("value", [0.0, 1.0, -2.718281828, 1.00390625, 3.3895e38, math.inf, -math.inf, math.nan])
def test_bfloat16_is_rounded_as_torch_does(value):
    kernel = pytest.importorskip("llmsurgeon.modeling.surgeon_fff_numba", exc_type=RuntimeError)
    wide = torch.tensor([[value, value * 1.001, 1 / 3]])
    found = torch.empty(1, 3, dtype=torch.bfloat16)
    kernel.narrow(wide.numpy(), found.view(torch.uint16).numpy())
    assert torch.equal(found, wide.bfloat16()) or (math.isnan(value) and found[0, 0].isnan())


def test_threads_do_not_change_the_result():
    if "numba" not in kernels():
        pytest.skip("numba is not installed")
    before = torch.get_num_threads()
    x = torch.randn(200, 24, generator=torch.Generator().manual_seed(3))
    try:
        for module in (node_form(depth=8, trees=1), leaf_form(depth=7)):
            torch.set_num_threads(1)
            single = hard(module, x, "numba")
            torch.set_num_threads(2)
            assert torch.equal(hard(module, x, "numba"), single)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("make", [leaf_form, node_form])
def test_soft_becomes_hard_as_the_temperature_falls(make):
    module = make()
    x = torch.randn(40, 24, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = module(x)
        module.train()
        soft = module(x)
        module.temperature = 1e-6
        hardened = module(x)
    assert (soft - expected).abs().max() > 0.01
    torch.testing.assert_close(hardened, expected, atol=1e-5, rtol=1e-5)


def test_hyperplanes_scaled_up_are_hard_too():
    module = leaf_form()
    x = torch.randn(40, 24, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        module.router_weight.mul_(1e6)
        module.router_bias.mul_(1e6)
        expected = module(x)
        torch.testing.assert_close(module.train()(x), expected, atol=1e-5, rtol=1e-5)


def test_soft_output_is_the_mixture_over_leaves():
    module = leaf_form(depth=2).train()
    x = torch.randn(7, 24, generator=torch.Generator().manual_seed(5))
    right = torch.sigmoid(x @ module.router_weight.T + module.router_bias)
    weights = [
        (1 - right[:, 0]) * (1 - right[:, 1]),
        (1 - right[:, 0]) * right[:, 1],
        right[:, 0] * (1 - right[:, 2]),
        right[:, 0] * right[:, 2],
    ]
    expected = module.shared(x)
    for leaf, weight in enumerate(weights):
        own = module.leaf_activations(x, leaf) @ module.leaf_down[leaf] + module.leaf_out_bias[leaf]
        expected = expected + weight[:, None] * own
    torch.testing.assert_close(module(x), expected)


def test_entropies_and_the_hardening_loss():
    module = node_form(depth=2, trees=2).train()
    assert module.entropies is None and fff.hardening_loss(module) == 0 and fff.mean_entropies(module) == {}
    x = torch.randn(50, 24, generator=torch.Generator().manual_seed(5))
    module(x)
    branch = module._scores(x)[0][..., :3].flatten(1)
    p = torch.sigmoid(branch)
    expected = -(p * p.log() + (1 - p) * (1 - p).log()).mean(0)
    torch.testing.assert_close(module.entropies, expected, atol=1e-4, rtol=1e-4)
    loss = fff.hardening_loss(torch.nn.Sequential(module))
    torch.testing.assert_close(loss, module.entropies.sum())
    assert fff.mean_entropies(torch.nn.Sequential(module)) == {"0": module.entropies.mean().item()}
    loss.backward()
    assert module.node_up.grad[:, :3].abs().sum() > 0 and module.node_up.grad[:, 3:].abs().sum() == 0


def test_region_leak_swaps_decisions_in_training_only():
    module = leaf_form()
    x = torch.randn(30, 24, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected, soft = module(x), module.train()(x)
        module.region_leak = 1.0
        swapped = module(x)
        module.router_weight.neg_()
        module.router_bias.neg_()
        module.region_leak = 0.0
        torch.testing.assert_close(module(x), swapped)
        assert not torch.allclose(swapped, soft)
        module.router_weight.neg_()
        module.router_bias.neg_()
        module.region_leak = 1.0
        torch.testing.assert_close(module.eval()(x), expected)


@pytest.mark.parametrize("make", [leaf_form, node_form])
def test_gradients_reach_every_parameter_in_training_and_flow_through_hard_inference(make):
    module = make().train()
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(5))
    module(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in module.parameters())
    inputs = x.clone().requires_grad_()
    module.eval()(inputs).sum().backward()
    assert inputs.grad.abs().sum() > 0


def test_a_forced_kernel_that_cannot_run_says_why(monkeypatch):
    module, x = node_form(), torch.zeros(1, 24)
    monkeypatch.setattr(fff, "installed", lambda name: False)
    for kernel, extra in (("numba", "cpu"), ("triton", "gpu")):
        monkeypatch.setenv("LLMSURGEON_FFF_KERNEL", kernel)
        message = rf"LLMSURGEON_FFF_KERNEL={kernel}: {kernel} is not installed \(pip install {kernel}, or .*\[{extra}\]"
        with torch.no_grad(), pytest.raises(RuntimeError, match=message):
            module(x)
    monkeypatch.setenv("LLMSURGEON_FFF_KERNEL", "cuda")
    with torch.no_grad(), pytest.raises(RuntimeError, match="no such kernel; expected auto, torch, numba, triton"):
        module(x)
    monkeypatch.setenv("LLMSURGEON_FFF_KERNEL", "auto")
    with torch.no_grad():
        assert module(x).shape == (1, 24)


def test_kernels_that_do_not_fit_are_passed_over_or_refused(monkeypatch):
    monkeypatch.setattr(fff, "installed", lambda name: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cpu = torch.device("cpu")
    assert fff.choose_kernel(cpu, torch.float32, "gelu") == "numba"
    assert fff.choose_kernel(cpu, torch.float64, "gelu") == "torch"
    assert fff.choose_kernel(cpu, torch.float32, "mish") == "torch"
    assert fff.choose_kernel(torch.device("cuda"), torch.float16, "silu") == "triton"
    assert fff.choose_kernel(cpu, torch.float32, "gelu", differentiable=True) == "torch"
    monkeypatch.setenv("LLMSURGEON_FFF_KERNEL", "numba")
    with pytest.raises(RuntimeError, match=r"it does not take torch\.float64"):
        fff.choose_kernel(cpu, torch.float64, "gelu")
    with pytest.raises(RuntimeError, match="it does not know the activation mish"):
        fff.choose_kernel(cpu, torch.float32, "mish")
    monkeypatch.setenv("LLMSURGEON_FFF_KERNEL", "triton")
    with pytest.raises(RuntimeError, match="it runs on cuda, the tensors are on cpu"):
        fff.choose_kernel(cpu, torch.float32, "gelu")


def test_weights_that_change_are_seen():
    """The compiled kernel keeps arrays on the weights: in-place changes, casts and new tensors must reach it."""
    if "numba" not in kernels():
        pytest.skip("numba is not installed")
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(3))
    for module in (node_form(), leaf_form()):
        hard(module, x, "numba")
        for change in (lambda p: p.mul_(0.5), lambda p: p.set_(torch.randn(p.shape) * 0.3)):
            with torch.no_grad():
                for parameter in module.parameters():
                    change(parameter)
            torch.testing.assert_close(hard(module, x, "numba"), hard(module, x, "torch"), atol=1e-5, rtol=1e-4)
        module.to(torch.bfloat16)
        hard(module, x.bfloat16(), "numba")
        module.float()
        torch.testing.assert_close(hard(module, x, "numba"), hard(module, x, "torch"), atol=1e-5, rtol=1e-4)
