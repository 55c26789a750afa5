"""MatMul-free LMs (arXiv 2406.02528) beside Llamas of their size: memory and latency at inference, and training.

Stacks of random weights (gpu_parts/stack.py): attentions and dense weights in bfloat16 against MLGRUs and packed
ternary weights. A prompt of 2048 tokens, and one token behind it in a CUDA graph; bytes are what the allocator held at
most. Training: a BitLinear's forward and backward pass, fused by triton, fused in torch, and step by step, at the width
of 1.3B. Paper at 13B: 4.19 GB against 48.50 GB, 695 ms against 3,183 ms; training at 1.3B: 61 % less memory, 25.6 %
faster.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu_parts.stack import Layer, Packed, Shape, Stack
from gpu_parts.ternary import packed_ways
from gpu_parts.timing import Setting, freed, in_turn, peak

# Hidden width, heads, FFN, layers; vocabulary of 32,000.
SIZES = {
    "370M": (1024, 8, 2816, 24),
    "1.3B": (2048, 16, 5632, 24),
    "2.7B": (2560, 20, 6912, 32),
    "13B": (5120, 40, 13824, 40),
}
PROMPT, VOCAB = 2048, 32000
# Of a training step: enough that the card and not the launches are timed.
TOKENS = 16384


def rows(setting: Setting) -> Iterator[dict[str, Any]]:
    """Inference at each size, then training."""
    sizes = {"tiny": (32, 4, 64, 2)} if setting.dry else SIZES
    if setting.quick:
        sizes = {name: sizes[name] for name in ("1.3B", "13B") if name in sizes} or sizes
    for name, each in sizes.items():
        yield {"what": "inference", "model": name, **inference(setting, *each)}
    for width, inner in ((32, 64),) if setting.dry else ((2048, 5632),):
        for shape in ((width, width), (width, inner), (inner, width)):
            yield {"what": "training", "inputs": shape[0], "outputs": shape[1], **training(setting, *shape)}


@torch.inference_mode()
def inference(setting: Setting, hidden: int, heads: int, ffn: int, layers: int) -> dict[str, Any]:
    """Bytes, and microseconds of a prompt and of a token, of both models."""
    device, dtype = setting.device, setting.dtype
    prompt, vocab = (8, 64) if setting.dry else (PROMPT, VOCAB)
    llama = Shape.llama(hidden, heads, heads, ffn, layers, vocab)
    free = replace(llama, layers=tuple(Layer("mlgru", ffn) for _ in llama.layers))
    ways = packed_ways(tokens=1)
    product = ways.get("packed, 8-bit activations", ways.get("packed, torch"))
    models = {"Llama": (llama, None), "MatMul-free": (free, lambda o, i: Packed(o, i, device, product))}
    found: dict[str, Any] = {"prompt": prompt}
    for name, (shape, linear) in models.items():
        freed()
        stack = Stack(shape, 1, prompt, device, dtype, linear)
        x = torch.randn(1, prompt, hidden, device=device, dtype=dtype)
        held = peak(partial(stack.prefill, x), device)
        times = in_turn({"prompt": partial(stack.prefill, x)}, device, 0.6, graphs=False)
        times |= in_turn({"token": stack.decode}, device, 0.6)
        found[name] = {"weights_and_cache": stack.nbytes(), "peak": held, "numbers": shape.numbers(), "times": times}
        del stack
    freed()
    return found


def training(setting: Setting, inputs: int, outputs: int) -> dict[str, Any]:
    """Microseconds and bytes of a BitLinear's forward and backward pass on 8 x 2048 tokens."""
    from llmsurgeon.modeling.surgeon_mlgru import BitLinear

    device = setting.device
    tokens = 16 if setting.dry else TOKENS
    layer = BitLinear(inputs, outputs, False, 1e-6).to(device, setting.dtype).train()
    x = torch.randn(tokens, inputs, device=device, dtype=setting.dtype, requires_grad=True)
    upstream = torch.randn(tokens, outputs, device=device, dtype=setting.dtype)

    def step(way: str) -> None:
        layer.fused = way != "step by step"
        os.environ["LLMSURGEON_MLGRU_KERNEL"] = "auto" if way == "fused, triton" else "torch"
        layer(x).backward(upstream)
        layer.zero_grad()
        x.grad = None

    ways = {way: partial(step, way) for way in ("fused, triton", "fused", "step by step")}
    found: dict[str, Any] = {"tokens": tokens, "times": in_turn(ways, device, 1.0, graphs=False)}
    found["saved_bytes"] = {}
    for way in ways:
        step(way)
        layer.fused = way != "step by step"
        found["saved_bytes"][way] = _waited_for(layer, x)
    found["peak"] = {way: peak(call, device) for way, call in ways.items()}
    os.environ.pop("LLMSURGEON_MLGRU_KERNEL", None)
    return found


def _waited_for(layer: Any, x: Tensor) -> int:
    """Bytes that the backward pass waits for, without weights and the input."""
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = layer(x)
    own = {tensor.untyped_storage().data_ptr() for tensor in (x, output, *layer.parameters())}
    return sum(size for pointer, size in found.items() if pointer not in own)
