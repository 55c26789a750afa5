"""Which tiles the packed products take: candidates at a few sizes, compiled side by side and then timed alone.

What tile_of and Few.of in llmsurgeon/kernels/packed_triton.py choose was read off this. Weights rotate, as in
gpu_parts/ternary.py.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from gpu_parts.timing import Setting, copies_of, freed, in_turn, per_copy, rotated

SHAPES = {"attention": (4096, 4096), "up": (14336, 4096)}
WAYS: dict[str, dict[str, Any]] = {"its own activations": {"asm": True}, "8 bits": {"asm": True, "rounded": True}}


def rows(setting: Setting) -> Iterator[dict[str, Any]]:
    """The five best of each size and way, and what is taken unasked."""
    shapes = {"tiny": (64, 48)} if setting.dry else SHAPES
    counts = (2,) if setting.dry else (1, 16, 2048) if setting.quick else (1, 2, 4, 8, 16, 64, 512, 2048)
    if not setting.dry:
        compiled(counts)
    for (name, shape), tokens in itertools.product(shapes.items(), counts):
        for way, how in {"plain": {}}.items() if setting.dry else WAYS.items():
            yield {"shape": name, "tokens": tokens, "way": way, **best(setting, *shape, tokens, how)}
            freed()


def candidates(tokens: int, rounded: bool) -> list[dict[str, Any]]:
    """What a product of so many tokens might be asked to take."""
    from llmsurgeon.kernels.packed_triton import Few, Tile

    if tokens > 16:
        wide = (64,) if tokens <= 64 else (128, 256)
        sizes = itertools.product((32, 64), wide, (64, 128), ((4, 3), (8, 3)))
        return [{"tile": Tile(rows, many, inputs, 1, *how)} for rows, many, inputs, how in sizes]
    found: list[dict[str, Any]] = []
    for together, rows, columns, warps in itertools.product(
        (1, 4, 8, 16), (1, 2, 4, 8), (512, 1024, 2048, 4096), (2, 4, 8)
    ):
        sums = 4 * together * rows * columns // (4 if rounded else 1) // (32 * warps)
        wide = columns // (16 if rounded else 4) >= 32 * warps
        if together <= tokens <= 16 * together and 16 <= sums <= 128 and wide and (rounded or together == 1):
            found.append({"few": Few(together, rows, columns, warps)})
    inputs_and_parts = itertools.product((128, 256), (1, 4), ((2, 4), (4, 3)))
    return found + [{"tile": Tile(16, 16, inputs, parts, *how)} for inputs, parts, how in inputs_and_parts]


def inputs_of(device: torch.device, outputs: int, inputs: int, tokens: int, copies: int) -> tuple[Any, Any, Any]:
    """x, packed weights and scales."""
    bits = torch.randint(0, 3, (copies, outputs // 4, inputs), device=device, dtype=torch.uint8) * 85
    x = torch.randn(tokens, inputs, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    return x, bits, torch.rand(outputs, device=device) + 0.5


def compiled(counts: tuple[int, ...]) -> None:
    """Every candidate, by as many processes as there are CPUs; the kernels end up in triton's cache on disk."""
    jobs = [
        (tokens, way, each)
        for tokens in counts
        for way, how in WAYS.items()
        for each in candidates(tokens, "rounded" in how)
    ]
    with multiprocessing.get_context("spawn").Pool(max(1, (os.cpu_count() or 2) - 2)) as pool:
        pool.map(_compile, jobs, chunksize=2)


def _compile(job: tuple[int, str, dict[str, Any]]) -> None:
    from llmsurgeon.kernels.packed_triton import product

    tokens, way, each = job
    x, bits, scale = inputs_of(torch.device("cuda"), 256, 4096, tokens, 1)
    with contextlib.suppress(Exception):  # what does not fit is left out again where it is timed
        product(x, bits[0], scale, **each, **WAYS[way])


@torch.inference_mode()
def best(setting: Setting, outputs: int, inputs: int, tokens: int, how: dict[str, Any]) -> dict[str, Any]:
    """Microseconds of the tile taken unasked and of the best, and why tiles are left out."""
    from llmsurgeon.kernels.packed_triton import product

    device = setting.device
    copies = copies_of(outputs * inputs // 4, device)
    x, bits, scale = inputs_of(device, outputs, inputs, tokens, copies)
    expected = product(x, bits[0], scale, **how).double()
    found, left_out = [], []
    tried = candidates(tokens, "rounded" in how)
    for given in [{}, *(tried[:2] if setting.dry else tried)]:
        call = partial(lambda given, number: product(x, bits[number], scale, **given, **how), given)
        try:
            error = float((call(0).double() - expected).norm() / expected.norm())
            [time] = in_turn({"it": rotated(call, copies)}, device, 0.02).values()
        except Exception as problem:
            left_out.append(f"{given}: {type(problem).__name__} {str(problem)[:80]}")
            continue
        found.append(
            {"given": str(next(iter(given.values()), None)), "us": per_copy(time, copies)["us"], "error": error}
        )
    unasked, rest = found[0], sorted(found[1:], key=lambda each: each["us"])
    return {"unasked": unasked, "best": rest[:5], "tried": len(rest), "left_out": len(left_out), "why": left_out[:2]}
