"""Packed ternary linears beside bfloat16 and int8 ones, at the sizes of Llama-3.1-8B's.

Packed: 2 bits a weight, activations as they are or of 8 bits; codes taken out in registers, or written out for cuBLAS.
Weights rotate, so that each product reads them from memory; `floor_us` is what their bytes take at 3.0 TB/s, a copy's
rate on an H100.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from gpu_parts.timing import Setting, copies_of, freed, in_turn, per_copy, rotated

SHAPES = {"attention": (4096, 4096), "up": (14336, 4096), "down": (4096, 14336)}
TOKENS = (1, 4, 16, 64, 128, 256, 512, 2048)
BYTES_A_SECOND = 3.0e12


def rows(setting: Setting) -> Iterator[dict[str, Any]]:
    """One row for each shape and number of tokens."""
    shapes = {"tiny": (32, 48)} if setting.dry else dict(list(SHAPES.items())[:2]) if setting.quick else SHAPES
    counts = (1, 20) if setting.dry else (1, 16, 512) if setting.quick else TOKENS
    for name, (outputs, inputs) in shapes.items():
        for tokens in counts:
            yield {"shape": name, "outputs": outputs, "inputs": inputs, "tokens": tokens} | measured(
                setting, outputs, inputs, tokens
            )
            freed()


@torch.inference_mode()
def measured(setting: Setting, outputs: int, inputs: int, tokens: int) -> dict[str, Any]:
    """Microseconds of one product by each way, and how far the packed ones are from the dense one."""
    device, dtype = setting.device, setting.dtype
    copies = copies_of(outputs * inputs // 4, device)
    bits = torch.randint(0, 3, (copies, outputs // 4, inputs), device=device, dtype=torch.uint8)
    bits = bits * 85  # the same code in all four places
    codes = (bits[0] & 3).repeat(4, 1).to(dtype) - 1
    scale = torch.rand(outputs, device=device) + 0.5
    x = torch.randn(tokens, inputs, device=device, dtype=dtype)
    expected = (x.double() @ codes.double().T) * scale.double()
    dense_copies = copies_of(outputs * inputs * dtype.itemsize, device)
    dense = [(codes * scale[:, None].to(dtype)).clone() for _ in range(dense_copies)]
    ways: dict[str, tuple[Any, int]] = {"dense": (lambda number: F.linear(x, dense[number]), dense_copies)}
    if device.type == "cuda" and tokens > 16:
        whole = [codes.to(torch.int8) for _ in range(copies_of(outputs * inputs, device))]
        narrow = torch.randint(-127, 128, (tokens, inputs), device=device, dtype=torch.int8)
        ways["int8 of torch"] = (lambda number: torch._int_mm(narrow, whole[number].T), len(whole))
    errors: dict[str, float] = {}
    for name, kernel in packed_ways(tokens).items():
        errors[name] = float((kernel(x, bits[0], scale).double() - expected).norm() / expected.norm())
        ways[name] = (partial(lambda kernel, number: kernel(x, bits[number], scale), kernel), copies)
    times = in_turn({name: rotated(way, count) for name, (way, count) in ways.items()}, device, 0.3)
    times = {name: per_copy(each, ways[name][1]) for name, each in times.items()}
    floor = 1e6 * outputs * inputs / 4 / BYTES_A_SECOND
    return {"floor_us": floor, "errors": errors, "times": times}


def packed_ways(tokens: int) -> dict[str, Any]:
    """The products of packed weights, of more than a few tokens by each means; torch's where triton cannot run."""
    try:
        from llmsurgeon.kernels.packed_triton import INTERPRETED, product
    except ImportError:
        return {"packed, torch": unpacked}
    if not torch.cuda.is_available() and not INTERPRETED:
        return {"packed, torch": unpacked}
    ways = {"packed": product, "packed, 8-bit activations": partial(product, rounded=True)}
    means = {"packed, in registers": False, "packed, written out": True} if tokens > 16 else {}
    return ways | {name: partial(product, written_out=out) for name, out in means.items()}


def unpacked(x: torch.Tensor, bits: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The product as torch makes it of weights that are unpacked."""
    codes = torch.cat([(bits >> shift) & 3 for shift in (0, 2, 4, 6)]).to(x.dtype) - 1
    return F.linear(x, codes) * scale.to(x.dtype)
