"""A block transformer beside its parent: decode throughput by batch and context, prefill, KV bytes, and why.

    python benchmarks/block.py MODEL                           # blocks of 4, batch 1 to 128, context to 4096
    python benchmarks/block.py MODEL --block-lengths 1 4 --batches 1 32 --contexts 1024 --json

MODEL is a folder or hub id, of which config.json is enough: weights are random, as speed does not hang on them. The
block model has the parent's layers, half of them over blocks, and beside them one more embedding table and four
matrices. Prefill is of one sequence; for decoding its keys and values are repeated over the batch. Both models keep
keys and values in buffers with room to grow: transformers' own cache copies all of it for each token, which would slow
the parent most. Rounds are interleaved, and each is of 8 steps, whole blocks for every block length; medians count.

Arithmetic: FLOPs are 2 a multiplied weight and 4 a head's number and context entry; bytes are the weights that a step
reads, each once whatever the batch, and the keys and values. What would not fit --memory is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llmsurgeon.checkpoint.opening import read_config  # noqa: E402
from llmsurgeon.formats.caches import cached_call  # noqa: E402
from llmsurgeon.formats.configs import normalised  # noqa: E402
from llmsurgeon.formats.models import empty_model, expected_shapes  # noqa: E402
from llmsurgeon.formats.write import write_config  # noqa: E402
from llmsurgeon.model.families import family_of  # noqa: E402
from llmsurgeon.model.spec import ModelSpec  # noqa: E402
from llmsurgeon.operations import Subject  # noqa: E402
from llmsurgeon.operations.block import Block  # noqa: E402
from llmsurgeon.text.self_text import RoomyLayer  # noqa: E402

STEPS = 8


@dataclass
class Side:
    """One of the models, and its description."""

    name: str
    model: Any
    spec: ModelSpec
    bytes_per_number: int

    @property
    def length(self) -> int:
        """Tokens a block; 1 for the parent."""
        return self.spec.block_transformer.block_length if self.spec.block_transformer else 1

    def layers(self) -> tuple[list[int], list[int]]:
        """Layers that attend over the whole context, and layers that attend within a block."""
        split = self.spec.block_transformer.split if self.spec.block_transformer else len(self.spec.layers)
        every = list(range(len(self.spec.layers)))
        return every[:split], every[split:]

    def weights(self) -> dict[str, int]:
        """Numbers that are multiplied, by what for: over blocks, within one, once a block, at each token that the token
        decoder reads, at each token."""
        over, _ = self.layers()
        found = dict.fromkeys(("over", "within", "block", "read", "token"), 0)
        tables = ("embed_tokens.weight",)
        tied = self.model.config.tie_word_embeddings
        for name, parameter in self.model.named_parameters():
            if parameter.dim() < 2:
                continue
            if ".layers." in name:
                found["over" if int(name.split(".layers.")[1].split(".")[0]) in over else "within"] += parameter.numel()
            elif "token_projection" in name:
                found["read"] += parameter.numel()
            elif not name.endswith(tables):
                found["token" if name.startswith("lm_head") else "block"] += parameter.numel()
            elif tied and "block_embedder" not in name:
                found["token"] += parameter.numel()
        return found

    def flops_per_token(self, context: int) -> float:
        """Of decoding one token of one sequence behind `context` tokens, on average over a block."""
        weights, halves = self.weights(), self.spec.block_transformer
        positions = halves.positions if halves else 1
        over, within = (
            sum(4 * a.heads * a.head_dim for i in layers for a in self.spec.layers[i].attentions)
            for layers in self.layers()
        )
        once = 2 * (weights["over"] + weights["block"]) + over * context / self.length
        inside = positions * 2 * weights["within"] + within * sum(range(1, positions + 1))
        inside += 2 * weights["read"] * (halves.embedded if halves else 0)
        return (once + inside) / self.length + 2 * weights["token"]

    def bytes_per_token(self, context: int, batch: int) -> float:
        """Of decoding one token of each of `batch` sequences, for one of them, on average over a block."""
        weights, halves = self.weights(), self.spec.block_transformer
        positions = halves.positions if halves else 1
        over, within = (
            sum(a.kv_width for i in layers for a in self.spec.layers[i].attentions) for layers in self.layers()
        )
        passes = (weights["over"] + weights["block"]) / self.length + weights["within"] + weights["token"]
        passes += weights["read"] * (halves.embedded if halves else 0) / self.length
        read = over * context / self.length / self.length + within * positions / 2
        return self.bytes_per_number * (passes / batch + read)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--block-lengths", type=int, nargs="+", default=[4])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--memory", type=float, default=3.0, help="GB of keys and values of one model at most")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sides = models(arguments)
    for context in arguments.contexts:
        prompts = [prefill(side, context, arguments.rounds) for side in sides]
        for side, (seconds, _) in zip(sides, prompts, strict=True):
            show(prefill_row(side, sides[0], context, seconds, prompts[0][0]), arguments.json)
        for batch in arguments.batches:
            for row in decode(sides, [cache for _, cache in prompts], context, batch, arguments):
                show(row, arguments.json)
    if not arguments.json:
        print(f"{platform.machine()}, {arguments.threads} threads, {arguments.dtype}, torch {torch.__version__}")


def models(arguments: argparse.Namespace) -> list[Side]:
    """The parent and a block model for each block length, with random weights."""
    config = normalised(read_config(arguments.model))
    family = family_of(config)
    spec = family.describe(config)
    names = frozenset(expected_shapes(empty_model(config)))
    dtype = getattr(torch, arguments.dtype)
    sides = [Side("parent", filled(config, dtype), spec, dtype.itemsize)]
    for length in arguments.block_lengths:
        subject = Subject(spec, family, names)
        made = Block(block_length=length).resolve(subject).plan(subject).spec
        written = write_config(made, family, config).config
        sides.append(Side(f"blocks of {length}", filled(written, dtype), made, dtype.itemsize))
    return sides


def filled(config: dict[str, Any], dtype: torch.dtype, device: str = "cpu") -> Any:
    """The model of a config with small random weights."""
    torch.manual_seed(0)
    model = empty_model(config)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    state = {name: torch.randn(shape, device=device).mul_(0.02).to(dtype) for name, shape in shapes.items()}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    return model.to(device).eval().requires_grad_(False)


def now(model: Any) -> float:
    """The time in seconds when the device has finished what it was given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.inference_mode()
def prefill(side: Side, context: int, rounds: int, together: int = 1) -> tuple[float, Any]:
    """Median seconds to read `context` tokens of one sequence, or of some, prompts that end where a block ends; and
    their cache."""
    ids = torch.randint(side.spec.vocab, (together, context), generator=torch.Generator().manual_seed(0))
    ids = ids.to(side.model.device)
    halves = {"block_padding": -context % side.length} if side.spec.block_transformer else {}
    taken, cache = [], None
    for _ in range(rounds + 1):
        start = now(side.model)
        _, cache = cached_call(side.model, input_ids=ids, logits_to_keep=1, **halves)
        taken.append(now(side.model) - start)
    return statistics.median(taken[1:]), cache


def repeated(side: Side, cache: Any, batch: int, room: int) -> Any:
    """The cache of `batch` sequences that are all alike, with room for more."""
    made = type(cache).__new__(type(cache))
    made.__dict__.update(cache.__dict__)
    fresh: dict[int, RoomyLayer] = {}

    def grown(layer: Any) -> RoomyLayer:
        if id(layer) not in fresh:
            new = fresh[id(layer)] = RoomyLayer(room)
            new.update(*(part.expand(batch, -1, -1, -1) for part in (layer.keys, layer.values)))
        return fresh[id(layer)]

    if side.spec.block_transformer is None:
        made.layers = [grown(layer) for layer in cache.layers]
        return made
    # What a block's tokens need is small and begins anew: it stays as it is.
    made.over_blocks = type(cache.over_blocks)(layers=[grown(layer) for layer in cache.over_blocks.layers])
    made.within_block = type(cache.over_blocks)(layers=[type(layer)() for layer in cache.within_block.layers])
    for new, old in zip(made.within_block.layers, cache.within_block.layers, strict=True):
        new.update(*(part.repeat(batch, 1, 1, 1) for part in (old.keys, old.values)))
    made.layers = [*made.over_blocks.layers, *made.within_block.layers]
    made._map(lambda tensor: tensor.repeat(batch, *[1] * (tensor.dim() - 1)))
    return made


@torch.inference_mode()
def decode(sides: list[Side], caches: list[Any], context: int, batch: int, arguments: argparse.Namespace) -> list[Any]:
    """Rows of decode throughput, the models in turn; a model whose keys and values would not fit is left out."""
    room = context + (arguments.rounds + 1) * STEPS
    runs = []
    for side, cache in zip(sides, caches, strict=True):
        held = batch * (room // side.length + 1) * held_per_entry(side)
        if held <= arguments.memory * 1e9:
            runs.append((side, repeated(side, cache, batch, room // side.length + 2), []))
    tokens = torch.zeros(batch, 1, dtype=torch.long, device=sides[0].model.device)
    for number in range(arguments.rounds + 1):
        for side, cache, taken in runs:
            start = now(side.model)
            for _ in range(STEPS):
                cached_call(side.model, cache, input_ids=tokens, logits_to_keep=1)
            if number:
                taken.append(now(side.model) - start)
    speeds = {side.name: STEPS * batch / statistics.median(taken) for side, _, taken in runs}
    return [
        {
            "what": "decode",
            "model": side.name,
            "batch": batch,
            "context": context,
            "tokens_per_second": speeds[side.name],
            "speedup": speeds[side.name] / speeds["parent"] if "parent" in speeds else None,
            "mflops_per_token": side.flops_per_token(context) / 1e6,
            "mbytes_per_token": side.bytes_per_token(context, batch) / 1e6,
            "kv_mbytes": held_bytes(cache) / 1e6,
        }
        for side, cache, _ in runs
    ]


def held_per_entry(side: Side) -> int:
    """Bytes of one entry of the cache that grows."""
    return side.bytes_per_number * sum(a.kv_width for i in side.layers()[0] for a in side.spec.layers[i].attentions)


def held_bytes(cache: Any) -> int:
    """Keys and values of the whole batch."""
    parts: list[Tensor] = [part for layer in cache.layers for part in (layer.keys, layer.values) if part is not None]
    return sum(part.numel() * part.element_size() for part in parts)


def prefill_row(side: Side, parent: Side, context: int, seconds: float, parent_seconds: float) -> dict[str, Any]:
    """Prefill's figures."""
    return {
        "what": "prefill",
        "model": side.name,
        "batch": 1,
        "context": context,
        "tokens_per_second": context / seconds,
        "speedup": parent_seconds / seconds,
        "kv_bytes_per_token": side.spec.kv_numbers_per_token() * side.bytes_per_number,
    }


def show(row: dict[str, Any], as_json: bool) -> None:
    """One line."""
    if as_json:
        print(json.dumps(row), flush=True)
        return
    speedup = f"{row['speedup']:5.2f} x" if row["speedup"] else "       "
    line = f"{row['what']:7} {row['model']:12} batch {row['batch']:4} context {row['context']:5}"
    line += f" {row['tokens_per_second']:9,.1f} tokens/s {speedup}"
    if row["what"] == "prefill":
        line += f"  KV {row['kv_bytes_per_token']:,} bytes a token"
    else:
        line += f"  {row['mflops_per_token']:7,.1f} MFLOP {row['mbytes_per_token']:7,.2f} MB a token"
        line += f"  KV {row['kv_mbytes']:,.1f} MB"
    print(line, flush=True)


if __name__ == "__main__":
    main()
