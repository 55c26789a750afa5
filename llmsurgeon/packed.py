"""Packed ternary linears inside a loaded model: 2 bits a weight in memory, on any CPU, without rounding activations.

    model = load_model("OUT")            # or AutoModelForCausalLM.from_pretrained
    pack_linears(model)

A few tokens are multiplied straight from the packed weights (numba). For many, rows are unpacked a block at a time into
a buffer that stays in the core's cache, and multiplied there by torch's product: memory is read for 2 bits a weight.
What is computed is what the plain checkpoint computes, in float32 sums.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from llmsurgeon.ternary import grid_of, is_ternary, put_in_place, taken_apart

ROWS = 4  # of one byte
# Tokens up to which products come straight from the packed weights: an unpacked matrix serves more at once.
DECODED = 8
# Bytes of unpacked rows at a time: about half of a core's second-level cache.
BLOCK_BYTES = 1 << 20
# The integers as wide as a dtype's numbers.
INTEGER = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
Kernels = tuple[Callable[..., Any], Callable[..., Any]]


class PackedLinear(nn.Module):
    """A linear with ternary weights, one scale for the tensor or for each row.

    bits: uint8 [O / 4, I], byte [r, c] holds the codes + 1 of rows r, r + R, r + 2 R, r + 3 R. scale: float32 [O].
    """

    def __init__(self, codes_OI: Tensor, scale_O: Tensor, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__()
        outputs, inputs = codes_OI.shape
        self.in_features, self.out_features, self.dtype = inputs, outputs, dtype
        parts = (codes_OI + 1).to(torch.uint8).view(ROWS, outputs // ROWS, inputs)
        self.register_buffer("bits", parts[0] | parts[1] << 2 | parts[2] << 4 | parts[3] << 6)
        self.register_buffer("scale", scale_O.float().clone())
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O] in x's dtype."""
        rows = x.reshape(-1, self.in_features)
        kernels = _kernels() if x.device.type == "cpu" and not x.requires_grad else None
        scale: Any = self.scale
        if kernels and len(rows) <= DECODED:
            made = self._straight(rows.detach(), kernels[0])
        elif kernels and rows.dtype in (torch.float32, torch.bfloat16):
            made = self._in_blocks(rows.detach(), kernels[1]) * scale.to(rows.dtype)
        else:
            made = nn.functional.linear(rows, self._codes().to(rows.dtype)) * scale.to(rows.dtype)
        return (made if self.bias is None else made + self.bias).view(*x.shape[:-1], self.out_features)

    def _straight(self, rows: Tensor, kernel: Callable[..., Any]) -> Tensor:
        bits: Any = self.bits
        scale: Any = self.scale
        products = [
            torch.from_numpy(kernel(row.numpy(), bits.numpy(), torch.get_num_threads())) for row in rows.float()
        ]
        return (torch.stack(products) * scale).to(rows.dtype)

    def _in_blocks(self, rows: Tensor, unpack: Callable[..., Any]) -> Tensor:
        """[n, I] times the codes: [n, O]."""
        bits: Any = self.bits
        many, inputs = bits.shape
        step = max(1, min(many, BLOCK_BYTES // (ROWS * inputs * rows.dtype.itemsize)))
        buffer = torch.empty(ROWS, step, inputs, dtype=rows.dtype)
        made = torch.empty(len(rows), ROWS, many, dtype=rows.dtype)
        for start in range(0, many, step):
            part = bits[start : start + step]
            codes = buffer[:, : len(part)]
            # numba knows no bfloat16: it writes the bits.
            unpack(part.numpy(), codes.view(INTEGER[rows.dtype]).numpy(), torch.get_num_threads())
            products = rows @ codes.flatten(0, 1).T
            made[:, :, start : start + step] = products.view(len(rows), ROWS, -1)
        return made.flatten(1)

    def _codes(self) -> Tensor:
        """The codes [O, I], int8."""
        bits: Any = self.bits
        return torch.cat([(bits >> shift) & 3 for shift in (0, 2, 4, 6)]).to(torch.int8) - 1


def pack_linears(model: nn.Module) -> tuple[str, ...]:
    """Pack the model's ternary linears in place. Returns their names; others, and groups in rows, stay."""
    packed = []
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or module.out_features % ROWS or not is_ternary(module.weight):
            continue
        grid = grid_of(module.weight)
        if grid.granularity == "group":
            continue
        codes, scale = taken_apart(module.weight, grid)
        put_in_place(model, name, PackedLinear(codes, scale[:, 0], module.bias, module.weight.dtype))
        packed.append(name)
    return tuple(packed)


def resident_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = {t.data_ptr(): t.numel() * t.itemsize for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


@cache
def _kernels() -> Kernels | None:
    """The product of packed weights and what unpacks them, None where numba is not installed."""
    try:
        from llmsurgeon.packed_numba import product, unpack
    except ImportError:
        return None
    return product, unpack


__all__ = ["PackedLinear", "pack_linears", "resident_bytes"]
