"""Decoder layers as plain functions of random weights, for decoding in one CUDA graph: shapes matter, values do not.

A stack is what a description says (`Shape`): each layer an attention, an MLGRU or neither, and a gated FFN of its own
width or none. Keys and values lie in buffers of the whole context, which each step reads.

Shapes: B sequences, D model width, H query heads, K key/value heads, E head width, T context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Layer:
    """mixer: "attention", "mlgru" or None. ffn: its width, or None."""

    mixer: str | None
    ffn: int | None


@dataclass(frozen=True)
class Shape:
    """A model's sizes; `layers` may be fewer than the model's, where all of them would not fit."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: tuple[Layer, ...]
    vocab: int = 0

    @classmethod
    def llama(cls, hidden: int, heads: int, kv_heads: int, ffn: int, layers: int, vocab: int = 0) -> Shape:
        """A plain Llama."""
        return cls(hidden, heads, kv_heads, hidden // heads, (Layer("attention", ffn),) * layers, vocab)

    def without_attention(self, layers: Sequence[int]) -> Shape:
        """These layers keep their FFN alone."""
        return replace(
            self, layers=tuple(replace(e, mixer=None) if i in layers else e for i, e in enumerate(self.layers))
        )

    def fused(self, runs: Sequence[Sequence[int]]) -> Shape:
        """The FFNs of each run become one, in its first layer; the layers behind that one are gone."""
        widths = {run[0]: sum(self.layers[i].ffn or 0 for i in run) for run in runs}
        gone = {i for run in runs for i in run[1:]}
        kept = [replace(e, ffn=widths.get(i, e.ffn)) for i, e in enumerate(self.layers) if i not in gone]
        return replace(self, layers=tuple(kept))

    def numbers(self) -> int:
        """Weights."""
        width = self.heads * self.head_dim
        attention = 2 * self.hidden * (width + self.kv_heads * self.head_dim)
        mixers = {"attention": attention, "mlgru": 4 * self.hidden * self.hidden, None: 0}
        return self.vocab * self.hidden + sum(
            mixers[each.mixer] + 3 * self.hidden * (each.ffn or 0) for each in self.layers
        )


class Stack:
    """A shape with random weights. linear: (outputs, inputs) -> a linear, which tells dense from packed."""

    def __init__(
        self, shape: Shape, batch: int, context: int, device: torch.device, dtype: torch.dtype, linear: Any = None
    ) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        make = linear or (lambda outputs, inputs: dense(outputs, inputs, device, dtype))
        d, width, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.gain = torch.ones(d, device=device, dtype=dtype)
        self.layers: list[dict[str, Any]] = []
        for each in shape.layers:
            made: dict[str, Any] = {}
            if each.mixer == "attention":
                made |= {"qkv": make(width + 2 * kv, d), "out": make(d, width)}
                size = (batch, shape.kv_heads, context, shape.head_dim)
                made |= {name: torch.randn(size, device=device, dtype=dtype) for name in ("keys", "values")}
            elif each.mixer == "mlgru":
                made |= {"fig": make(3 * d, d), "out": make(d, d)}
                made["state"] = torch.zeros(batch, d, device=device)
            if each.ffn:
                made |= {"up": make(2 * each.ffn, d), "down": make(d, each.ffn)}
            self.layers.append(made)
        self.head = make(shape.vocab, d) if shape.vocab else None
        turn = torch.rand(shape.head_dim // 2, device=device)
        self.cos, self.sin = (f(torch.cat([turn, turn])).to(dtype) for f in (torch.cos, torch.sin))
        self.x = torch.randn(batch, 1, d, device=device, dtype=dtype)

    def decode(self) -> Tensor:
        """One token of each sequence, behind `context` others."""
        x = self.x
        for made in self.layers:
            if "qkv" in made:
                x = x + self._attend(F.rms_norm(x, x.shape[-1:], self.gain), made, None)
            elif "fig" in made:
                x = x + self._recur(F.rms_norm(x, x.shape[-1:], self.gain), made)
            if "up" in made:
                x = x + _feed(F.rms_norm(x, x.shape[-1:], self.gain), made)
        return x if self.head is None else self.head(F.rms_norm(x, x.shape[-1:], self.gain))

    def prefill(self, x_BTD: Tensor) -> Tensor:
        """A prompt; of what comes out the last position goes through the head."""
        for made in self.layers:
            if "qkv" in made:
                x_BTD = x_BTD + self._attend(F.rms_norm(x_BTD, x_BTD.shape[-1:], self.gain), made, x_BTD.shape[1])
            elif "fig" in made:
                x_BTD = x_BTD + self._recur(F.rms_norm(x_BTD, x_BTD.shape[-1:], self.gain), made)
            if "up" in made:
                x_BTD = x_BTD + _feed(F.rms_norm(x_BTD, x_BTD.shape[-1:], self.gain), made)
        last = x_BTD[:, -1:]
        return last if self.head is None else self.head(F.rms_norm(last, last.shape[-1:], self.gain))

    def _attend(self, x: Tensor, made: dict[str, Any], prompt: int | None) -> Tensor:
        shape, (batch, tokens, _) = self.shape, x.shape
        sizes = [shape.heads, shape.kv_heads, shape.kv_heads]
        parts = made["qkv"](x).view(batch, tokens, sum(sizes), shape.head_dim).transpose(1, 2).split(sizes, dim=1)
        q, k, v = parts
        q, k = (each * self.cos + _turned(each) * self.sin for each in (q, k))
        if prompt is None:
            made["keys"][:, :, -1:], made["values"][:, :, -1:] = k, v
            k, v = made["keys"], made["values"]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=prompt is not None, enable_gqa=True)
        return made["out"](mixed.transpose(1, 2).reshape(batch, tokens, -1))

    def _recur(self, x: Tensor, made: dict[str, Any]) -> Tensor:
        from llmsurgeon.modeling.surgeon_mlgru import linear_recurrence

        score, value, gate = made["fig"](x).chunk(3, dim=-1)
        keep = torch.sigmoid(score.float())
        states = linear_recurrence(keep, (1 - keep) * F.silu(value).float(), made["state"])
        made["state"].copy_(states[:, -1])
        return made["out"](torch.sigmoid(gate) * states.to(x.dtype))

    def nbytes(self) -> int:
        """Weights, caches and states."""
        held = [each for made in self.layers for each in made.values()] + ([self.head] if self.head else [])
        return sum(each.nbytes if isinstance(each, Tensor) else each.held for each in held)


class Dense:
    """A linear of random weights; `held` are its bytes."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.held = weight, weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def dense(outputs: int, inputs: int, device: torch.device, dtype: torch.dtype) -> Dense:
    """Random weights of a usual size."""
    return Dense(torch.randn(outputs, inputs, device=device, dtype=dtype) * inputs**-0.5)


class Packed:
    """A linear of random ternary weights, 2 bits each."""

    def __init__(self, outputs: int, inputs: int, device: torch.device, product: Any) -> None:
        self.bits = torch.randint(0, 3, (outputs // 4, inputs), device=device, dtype=torch.uint8) * 85
        self.scale = torch.full((outputs,), inputs**-0.5, device=device)
        self.product, self.held = product, self.bits.nbytes + self.scale.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        made: Tensor = self.product(x.flatten(0, -2), self.bits, self.scale)
        return made.view(*x.shape[:-1], -1)


def _feed(x: Tensor, made: dict[str, Any]) -> Tensor:
    gate, up = made["up"](x).chunk(2, dim=-1)
    out: Tensor = made["down"](F.silu(gate) * up)
    return out


def _turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
