"""Packed ternary linears inside a loaded model: 2 bits a weight in memory, on CPUs and GPUs.

    model = load_model("OUT")            # or AutoModelForCausalLM.from_pretrained
    pack_linears(model)

On a CPU a few tokens are multiplied straight from the packed weights (numba). For more, a linear's weights are unpacked
into room that all linears share, and multiplied by torch's product. On a GPU all products are made from the packed
weights (triton). What is computed is what the plain checkpoint computes, unless activations are rounded on request.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from llmsurgeon.model.ternary import grid_of, is_ternary, put_in_place, taken_apart

ROWS = 4  # of one byte
# Tokens up to which products come straight from the packed weights, 8 in other dtypes: torch's product is faster per
# token, and needs unpacked weights.
DECODED = {torch.float32: 32}
# What stands for a dtype that numba does not know.
INTEGER = {torch.bfloat16: torch.int16}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
Kernels = tuple[Callable[..., Any], Callable[..., Any]]


class PackedLinear(nn.Module):
    """A linear with ternary weights, one scale for the tensor or for each row.

    bits: uint8 [O / 4, I], byte [r, c] holds the codes + 1 of rows r, r + R, r + 2 R, r + 3 R. scale: float32 [O].
    """

    rounded = False  # whether activations are 8 bits and a scale a token, on a GPU

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
        if on_triton(x):
            made = _triton_product()(rows, self.bits, scale, self.bias, rounded=self.rounded)
            return made.view(*x.shape[:-1], self.out_features)
        if kernels and len(rows) <= DECODED.get(rows.dtype, 8):
            made = self._straight(rows.detach(), kernels[0])
        elif kernels and rows.dtype in (torch.float32, torch.bfloat16):
            made = self._unpacked(rows.detach(), kernels[1])
        else:
            made = nn.functional.linear(rows, self._codes().to(rows.dtype)) * scale.to(rows.dtype)
        return (made if self.bias is None else made + self.bias).view(*x.shape[:-1], self.out_features)

    def _straight(self, rows: Tensor, kernel: Callable[..., Any]) -> Tensor:
        """[n, I] -> [n, O] from the packed weights."""
        bits: Any = self.bits
        scale: Any = self.scale
        made = torch.from_numpy(kernel(rows.float().contiguous().numpy(), bits.numpy(), torch.get_num_threads()))
        return (made * scale).to(rows.dtype)

    def _unpacked(self, rows: Tensor, unpack: Callable[..., Any]) -> Tensor:
        """[n, I] -> [n, O] by torch's product with the weights as they would be in the plain checkpoint."""
        bits: Any = self.bits
        scale: Any = self.scale
        weight = _room(ROWS * bits.numel(), rows.dtype).view(ROWS, *bits.shape)
        sizes = scale.to(rows.dtype).view(ROWS, -1)
        # numba knows no bfloat16: it writes the bits.
        kind = INTEGER.get(rows.dtype, rows.dtype)
        unpack(bits.numpy(), sizes.view(kind).numpy(), weight.view(kind).numpy(), torch.get_num_threads())
        return nn.functional.linear(rows, weight.flatten(0, 1))

    def _codes(self) -> Tensor:
        """The codes [O, I], int8."""
        bits: Any = self.bits
        return torch.cat([(bits >> shift) & 3 for shift in (0, 2, 4, 6)]).to(torch.int8) - 1


def pack_linears(model: nn.Module, rounded: bool = False) -> tuple[str, ...]:
    """Pack the model's ternary linears in place. Returns their names; others, and groups in rows, stay.

    rounded: on a GPU, multiply 8-bit activations with a scale a token, as BitLinears are trained to bear.
    """
    packed = []
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or module.out_features % ROWS or not is_ternary(module.weight):
            continue
        grid = grid_of(module.weight)
        if grid.granularity == "group":
            continue
        codes, scale = taken_apart(module.weight, grid)
        made = PackedLinear(codes, scale[:, 0], module.bias, module.weight.dtype)
        made.rounded = rounded
        put_in_place(model, name, made)
        packed.append(name)
    return tuple(packed)


def resident_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = {t.data_ptr(): t.numel() * t.itemsize for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


_kept = threading.local()


def _room(count: int, dtype: torch.dtype) -> Tensor:
    """Room for so many numbers, this thread's own and kept for its next call: the system fills new pages with zeros."""
    rooms = _kept.__dict__
    if len(rooms.get(str(dtype), ())) < count:
        rooms[str(dtype)] = torch.empty(count, dtype=dtype)
    room: Tensor = rooms[str(dtype)]
    return room[:count]


def scratch_bytes() -> int:
    """Bytes that this thread keeps to unpack weights into: one linear's, the largest that read many tokens."""
    return sum(room.numel() * room.itemsize for room in _kept.__dict__.values())


@cache
def _kernels() -> Kernels | None:
    """The product of packed weights and what unpacks them, None where numba is not installed."""
    try:
        from llmsurgeon.kernels.packed_numba import product, unpack
    except ImportError:
        return None
    return product, unpack


def on_triton(x: Tensor) -> bool:
    """Whether triton multiplies: it is installed, the tensor is on a GPU (or triton is interpreted), nothing learns."""
    possible = x.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return possible and not x.requires_grad and x.dtype in FLOATS and _triton_product() is not None


@cache
def _triton_product() -> Any:
    """The product of packed weights on GPUs, None where triton is not installed."""
    try:
        from llmsurgeon.kernels.packed_triton import product
    except ImportError:
        return None
    return product


__all__ = ["PackedLinear", "pack_linears", "resident_bytes", "scratch_bytes"]
