"""Packed ternary linears inside a loaded model: 2 bits a weight in memory, on any CPU, without rounding activations.

    model = load_model("OUT")            # or AutoModelForCausalLM.from_pretrained
    pack_linears(model)

A few tokens are multiplied straight from the packed weights (numba); many unpack a linear once and use torch's product.
What is computed is what the plain checkpoint computes, in float32 sums.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from llmsurgeon.ternary import grid_of, is_ternary, taken_apart

ROWS = 4  # of one byte
# Tokens up to which products come straight from the packed weights: an unpacked matrix serves more at once.
DECODED = 8
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
        else:
            made = nn.functional.linear(rows, self._codes(kernels).to(rows.dtype)) * scale.to(rows.dtype)
        return (made if self.bias is None else made + self.bias).view(*x.shape[:-1], self.out_features)

    def _straight(self, rows: Tensor, kernel: Callable[..., Any]) -> Tensor:
        bits: Any = self.bits
        scale: Any = self.scale
        products = [
            torch.from_numpy(kernel(row.numpy(), bits.numpy(), torch.get_num_threads())) for row in rows.float()
        ]
        return (torch.stack(products) * scale).to(rows.dtype)

    def _codes(self, kernels: Kernels | None) -> Tensor:
        """The codes [O, I], as numbers or as float32."""
        bits: Any = self.bits
        if kernels:
            return torch.from_numpy(kernels[1](bits.numpy()))
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
        model.set_submodule(name, PackedLinear(codes, scale[:, 0], module.bias, module.weight.dtype))
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
        from llmsurgeon.packed_numba import product, unpacked
    except ImportError:
        return None
    return product, unpacked


__all__ = ["PackedLinear", "pack_linears", "resident_bytes"]
