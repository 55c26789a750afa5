"""Hard inference of fast feedforward networks on GPUs, compiled by triton: one program a token. Sums in float32.

This file ships inside converted checkpoints; surgeon_fff.py imports it where triton is installed. With
TRITON_INTERPRET=1 it runs on a CPU, slowly.

Shapes: N tokens, D model width, L leaves, W neurons a leaf, K trees, M nodes a tree.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:  # in a try block: transformers must not ask for triton where this file lies unused
    raise RuntimeError("surgeon_fff_triton.py needs triton: pip install triton") from error

ACTIVATIONS = {"silu": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3}
# Neurons of a leaf that a program multiplies at a time.
NEURONS = 8
# Node form: tokens up to which a program asks for the rows that it may need two levels on. Each decision waits for its
# rows, and memory is twice as far as the cache; of many tokens the rows are too many.
AHEAD = 64
# Tokens from which there are enough of them to fill a GPU with fewer warps each.
MANY = 4096
PREFETCH = tl.constexpr("prefetch.global.L2 [$1]; mov.u32 $0, 0;")


@triton.jit
def activated(z, KIND: tl.constexpr):
    if KIND == 0:
        return z * tl.sigmoid(z)
    elif KIND == 1:
        return tl.maximum(z, 0.0)
    elif KIND == 2:
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    else:
        # (1 + tanh(u)) / 2 = sigmoid(2 u)
        return z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))


@triton.jit
def asked(gate, up, down, tree, size, width, first, ROWS: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr,
          LINE: tl.constexpr):  # fmt: skip
    """Ask for so many rows of a tree from the first on: they come to the cache, and nobody waits for them."""
    row = tree + tl.minimum(first + tl.arange(0, ROWS), size - 1)
    at = row[:, None] * width + tl.minimum(tl.arange(0, BLOCK // LINE) * LINE, width - 1)[None, :]
    tl.inline_asm_elementwise(PREFETCH, "=r,l", [up + at], dtype=tl.int32, is_pure=False, pack=1)
    tl.inline_asm_elementwise(PREFETCH, "=r,l", [down + at], dtype=tl.int32, is_pure=False, pack=1)
    if GATED:
        tl.inline_asm_elementwise(PREFETCH, "=r,l", [gate + at], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def nodes_kernel(
    x, gate, up, down, gate_bias, up_bias, out_bias, y, trees, size, width,
    DEPTH: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr, BIASED: tl.constexpr, BLOCK: tl.constexpr,
    AHEAD: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    x_D = tl.load(x + token * width + at, mask=inside, other=0.0).to(tl.float32)
    y_D = tl.load(out_bias + at, mask=inside, other=0.0).to(tl.float32)
    # A node's row that writes is added while the next node's rows are on their way: each decision waits for its own.
    active, down_D = 0.0, y_D * 0
    for tree in range(trees):
        node = token * 0
        if AHEAD:
            for below in tl.static_range(0, 2):
                asked(gate, up, down, tree * size, size, width, token * 0 + below, 2, GATED, BLOCK, LINE)
        for _ in range(DEPTH + 1):
            row = tree * size + node
            if AHEAD:
                asked(gate, up, down, tree * size, size, width, 4 * node + 3, 4, GATED, BLOCK, LINE)
            up_D = tl.load(up + row * width + at, mask=inside, other=0.0)
            if GATED:
                gate_D = tl.load(gate + row * width + at, mask=inside, other=0.0)
            next_D = tl.load(down + row * width + at, mask=inside, other=0.0)
            y_D += active * down_D
            inner = tl.sum(x_D * up_D.to(tl.float32), 0)
            if BIASED:
                inner += tl.load(up_bias + row).to(tl.float32)
            branch = inner
            if GATED:
                branch = tl.sum(x_D * gate_D.to(tl.float32), 0)
                if BIASED:
                    branch += tl.load(gate_bias + row).to(tl.float32)
                active = activated(branch, KIND) * inner
            else:
                active = activated(branch, KIND)
            down_D = next_D.to(tl.float32)
            node = 2 * node + 1 + (branch > 0).to(tl.int64)
    y_D += active * down_D
    tl.store(y + token * width + at, y_D, mask=inside)


@triton.jit
def route_kernel(x, weight, bias, leaf, width, DEPTH: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    x_D = tl.load(x + token * width + at, mask=inside, other=0.0).to(tl.float32)
    node = token * 0
    for _ in range(DEPTH):
        score = tl.sum(x_D * tl.load(weight + node * width + at, mask=inside, other=0.0).to(tl.float32), 0)
        score += tl.load(bias + node).to(tl.float32)
        node = 2 * node + 1 + (score >= 0).to(tl.int64)
    tl.store(leaf + token, node - ((1 << DEPTH) - 1))


@triton.jit
def leaves_kernel(
    x, leaf, start, gate, up, down, gate_bias, up_bias, out_bias, y, neurons, width,
    KIND: tl.constexpr, GATED: tl.constexpr, BIASED: tl.constexpr, BLOCK: tl.constexpr, NEURONS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    own = tl.load(leaf + token)
    at = tl.arange(0, BLOCK)
    inside = at < width
    x_D = tl.load(x + token * width + at, mask=inside, other=0.0).to(tl.float32)
    y_D = tl.load(start + token * width + at, mask=inside, other=0.0).to(tl.float32)
    y_D += tl.load(out_bias + own * width + at, mask=inside, other=0.0).to(tl.float32)
    for first in range(0, neurons, NEURONS):
        w_W = first + tl.arange(0, NEURONS)
        there = w_W < neurons
        row_W = own * neurons + w_W
        place = row_W[:, None] * width + at[None, :]
        mask = there[:, None] & inside[None, :]
        inner = tl.sum(x_D[None, :] * tl.load(up + place, mask=mask, other=0.0).to(tl.float32), 1)
        if BIASED:
            inner += tl.load(up_bias + row_W, mask=there, other=0.0).to(tl.float32)
        if GATED:
            branch = tl.sum(x_D[None, :] * tl.load(gate + place, mask=mask, other=0.0).to(tl.float32), 1)
            if BIASED:
                branch += tl.load(gate_bias + row_W, mask=there, other=0.0).to(tl.float32)
            active = activated(branch, KIND) * inner
        else:
            active = activated(inner, KIND)
        y_D += tl.sum(active[:, None] * tl.load(down + place, mask=mask, other=0.0).to(tl.float32), 0)
    tl.store(y + token * width + at, y_D, mask=inside)


def nodes(x_ND, gate, up, down, gate_bias, up_bias, out_bias, depth, activation, warps=None, ahead=None):
    """Node form, [N, D] -> [N, D]: rows [K, M, D], biases [K, M] or None, out_bias [D].

    warps: that share a token; ahead: ask for rows before they are needed (CUDA alone); None: what pays.
    """
    x_ND, y_ND = x_ND.contiguous(), torch.empty_like(x_ND, memory_format=torch.contiguous_format)
    width = x_ND.shape[1]
    if warps is None:
        warps = 4 if len(x_ND) < MANY else x_ND.element_size() // 2
    if ahead is None:
        ahead = len(x_ND) <= AHEAD and x_ND.is_cuda and torch.version.hip is None
    if len(x_ND):
        nodes_kernel[(len(x_ND),)](
            x_ND, _or(gate, up), up, down, _or(gate_bias, up), _or(up_bias, up), out_bias, y_ND, *up.shape[:2], width,
            DEPTH=depth, AHEAD=ahead, LINE=128 // up.element_size(), num_warps=warps,
            **_kinds(gate, up_bias, activation, width),
        )  # fmt: skip
    return y_ND


def route(x_ND, weight, bias, depth):
    """Leaf form: the leaf of each token, int64 [N]."""
    x_ND, width = x_ND.contiguous(), x_ND.shape[1]
    leaf_N = torch.empty(len(x_ND), dtype=torch.long, device=x_ND.device)
    if len(x_ND):
        block = triton.next_power_of_2(width)
        route_kernel[(len(x_ND),)](x_ND, weight, bias, leaf_N, width, DEPTH=depth, BLOCK=block)
    return leaf_N


def leaves(x_ND, leaf_N, y_ND, gate, up, down, gate_bias, up_bias, out_bias, activation):
    """Leaf form: y_ND plus each token's leaf: rows [L, W, D], biases [L, W] or None, out_bias [L, D]."""
    x_ND, start_ND = x_ND.contiguous(), y_ND.contiguous()
    y_ND = torch.empty_like(start_ND)
    width = x_ND.shape[1]
    if len(x_ND):
        leaves_kernel[(len(x_ND),)](
            x_ND, leaf_N, start_ND, _or(gate, up), up, down, _or(gate_bias, up), _or(up_bias, up), out_bias, y_ND,
            up.shape[1], width, NEURONS=NEURONS, **_kinds(gate, up_bias, activation, width),
        )  # fmt: skip
    return y_ND


def _or(tensor, other):
    # A pointer has to be there, even where the kernel does not read it.
    return other if tensor is None else tensor


def _kinds(gate, up_bias, activation, width):
    return {
        "KIND": ACTIVATIONS[activation],
        "GATED": gate is not None,
        "BIASED": up_bias is not None,
        "BLOCK": triton.next_power_of_2(width),
    }
