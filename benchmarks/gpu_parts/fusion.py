"""FFN Fusion (arXiv 2503.18908): decoding before and after, at Llama-3.1-8B's and 70B's shapes; a shard of 405B's FFNs.

Whole stacks of random weights, one token of each sequence behind a context, in one CUDA graph: the parent, the parent
without some attentions, and that with its FFN runs fused. 70B is as many of its layers as fit. The shard is what one of
eight GPUs holds of 405B's FFNs (16384 wide, 6656 neurons): a run in sequence against the same run fused. No other GPU
is asked, so what fusion saves in all-reduces is not in these figures. Paper, 405B to 253B on 8 H100s: 1.71x in all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_parts.stack import Shape, Stack, dense
from gpu_parts.timing import Setting, freed, in_turn

CONTEXT = 1024
# Attentions that go and FFN runs that follow from it, as the joint search cuts models: a quarter of the layers.
CUTS_8B = (range(20, 28), ((20, 21, 22, 23), (24, 25, 26, 27)))
# The paper's 49B: layers 42 to 51 and 53 to 70 of 80; counted from layer 40 here, where the part of the model begins.
CUTS_70B = ((*range(2, 12), *range(13, 31)), ((*range(2, 12),), (*range(13, 31),)))
RUNS_405B = (8, 12, 15, 14)


def rows(setting: Setting) -> Iterator[dict[str, Any]]:
    """8B and 70B at each batch, then the runs of 405B's shard."""
    if setting.dry:
        tiny = Shape.llama(32, 4, 2, 64, 6)
        yield from stacks(setting, "tiny", tiny, (range(2, 5), ((2, 3, 4),)), (1, 2), 8)
        yield from shard(setting, 32, 24, (2,), (1,))
        return
    batches = (1, 32) if setting.quick else (1, 8, 32)
    yield from stacks(setting, "Llama-3.1-8B", Shape.llama(4096, 32, 8, 14336, 32, 128256), CUTS_8B, batches, CONTEXT)
    yield from shard(setting, 16384, 6656, RUNS_405B[:1] if setting.quick else RUNS_405B, batches)
    part = Shape.llama(8192, 64, 8, 28672, 33)  # 56 GB
    yield from stacks(setting, "Llama-3.1-70B, 33 of 80 layers", part, CUTS_70B, batches[:2], CONTEXT)


@torch.inference_mode()
def stacks(
    setting: Setting, name: str, shape: Shape, cuts: tuple[Any, Any], batches: tuple[int, ...], context: int
) -> Iterator[dict[str, Any]]:
    """The parent, without attentions, and fused: one after the other, as two would not fit."""
    gone, runs = cuts
    forms = {"parent": shape, "without attentions": shape.without_attention(tuple(gone))}
    forms["fused"] = forms["without attentions"].fused(runs)
    for batch in batches:
        times: dict[str, Any] = {}
        for form, each in forms.items():
            stack = Stack(each, batch, context, setting.device, setting.dtype)
            [times[form]] = in_turn({form: stack.decode}, setting.device, 0.6).values()
            times[form] |= {"layers": len(each.layers), "bytes": stack.nbytes()}
            del stack
            freed()
        found = {form: times["parent"]["us"] / each["us"] for form, each in times.items()}
        yield {"model": name, "batch": batch, "context": context, "times": times, "speedup": found}


@torch.inference_mode()
def shard(
    setting: Setting, hidden: int, width: int, runs: tuple[int, ...], batches: tuple[int, ...]
) -> Iterator[dict[str, Any]]:
    """A run of FFNs one after the other, against one FFN of all their neurons."""
    device, dtype = setting.device, setting.dtype
    gain = torch.ones(hidden, device=device, dtype=dtype)

    def feed(x: Tensor, up: Any, down: Any) -> Tensor:
        gate, value = up(F.rms_norm(x, x.shape[-1:], gain)).chunk(2, dim=-1)
        made: Tensor = x + down(F.silu(gate) * value)
        return made

    for length in runs:
        each = [(dense(2 * width, hidden, device, dtype), dense(hidden, width, device, dtype)) for _ in range(length)]
        wide = dense(2 * width * length, hidden, device, dtype), dense(hidden, width * length, device, dtype)
        for batch in batches:
            x = torch.randn(batch, hidden, device=device, dtype=dtype)

            def sequence(x: Tensor = x, each: Any = each) -> Tensor:
                for pair in each:
                    x = feed(x, *pair)
                return x

            ways = {"in sequence": sequence, "fused": lambda x=x, wide=wide: feed(x, *wide)}
            times = in_turn(ways, device, 0.8)
            speedup = times["in sequence"]["us"] / times["fused"]["us"]
            yield {"shard": "405B, 1 of 8", "run": length, "batch": batch, "times": times, "speedup": speedup}
        del each, wide
        freed()
