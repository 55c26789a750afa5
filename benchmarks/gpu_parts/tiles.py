"""Which tiles the packed products take: every candidate at a few sizes, compiled side by side and then timed alone.

What tile_of in llmsurgeon/kernels/packed_triton.py chooses was read off this. Weights rotate, as in gpu_parts/ternary.py.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from gpu_parts.timing import Setting, copies_of, freed, in_turn, rotated

SHAPES = {"attention": (4096, 4096), "up": (14336, 4096)}
WAYS = {"PTX": {"asm": True}, "8-bit activations, PTX": {"asm": True, "rounded": True}}


def rows(setting: Setting) -> Iterator[dict[str, Any]]:
    """The five best of each size and way, and the tile that is taken unasked."""
    shapes = {"tiny": (64, 48)} if setting.dry else dict(list(SHAPES.items())[-1:]) if setting.quick else SHAPES
    counts = (2,) if setting.dry else (1, 512) if setting.quick else (1, 16, 64, 512, 2048)
    if not setting.dry:
        compiled(counts)
    for (name, shape), tokens in itertools.product(shapes.items(), counts):
        for way, how in {"plain": {}}.items() if setting.dry else WAYS.items():
            yield {"shape": name, "tokens": tokens, "way": way, **best(setting, *shape, tokens, how)}
            freed()


def candidates(tokens: int) -> list[Any]:
    """Tiles that a product of so many tokens might take."""
    from llmsurgeon.kernels.packed_triton import Tile

    if tokens <= 16:
        sizes = itertools.product((16, 32), (128, 256, 512), (1, 2, 4), ((2, 4), (4, 3), (4, 5), (8, 3)))
        return [Tile(rows, 16, inputs, parts, *how) for rows, inputs, parts, how in sizes]
    wide = (64,) if tokens <= 64 else (64, 128, 256)
    sizes = itertools.product((32, 64), wide, (32, 64, 128), ((4, 3), (8, 3), (8, 4)))
    return [Tile(rows, many, inputs, 1, *how) for rows, many, inputs, how in sizes]


def inputs_of(device: torch.device, outputs: int, inputs: int, tokens: int, copies: int) -> tuple[Any, Any, Any]:
    """x, packed weights and scales."""
    bits = torch.randint(0, 3, (copies, outputs // 4, inputs), device=device, dtype=torch.uint8) * 85
    x = torch.randn(tokens, inputs, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    return x, bits, torch.rand(outputs, device=device) + 0.5


def compiled(counts: tuple[int, ...]) -> None:
    """Every candidate, by as many processes as there are CPUs; the kernels end up in triton's cache on disk."""
    jobs = [(tokens, way, tile) for tokens in sorted({min(c, 65) for c in counts}) for way in WAYS for tile in
            candidates(tokens)]  # fmt: skip
    with multiprocessing.get_context("spawn").Pool(max(1, (os.cpu_count() or 2) - 2)) as pool:
        pool.map(_compile, jobs, chunksize=4)


def _compile(job: tuple[int, str, Any]) -> None:
    from llmsurgeon.kernels.packed_triton import product

    tokens, way, tile = job
    x, bits, scale = inputs_of(torch.device("cuda"), 256, 4096, tokens, 1)
    try:
        product(x, bits[0], scale, tile=tile, **WAYS[way])
    except Exception:  # a tile that does not fit is left out again where it is timed
        pass


@torch.inference_mode()
def best(setting: Setting, outputs: int, inputs: int, tokens: int, how: dict[str, Any]) -> dict[str, Any]:
    """Microseconds of the tile taken unasked and of the best, and why tiles are left out."""
    from llmsurgeon.kernels.packed_triton import product

    device = setting.device
    copies = copies_of(outputs * inputs // 4, device)
    x, bits, scale = inputs_of(device, outputs, inputs, tokens, copies)
    expected = product(x, bits[0], scale, **how).double()
    found, left_out = [], []
    for tile in [None, *(candidates(tokens)[:2] if setting.dry else candidates(tokens))]:
        call = partial(lambda tile, number: product(x, bits[number], scale, tile=tile, **how), tile)
        try:
            error = float((call(0).double() - expected).norm() / expected.norm())
            [time] = in_turn({"tile": rotated(call, copies)}, device, 0.02).values()
        except Exception as problem:
            left_out.append(f"{tile}: {type(problem).__name__} {str(problem)[:80]}")
            continue
        found.append({"tile": asdict(tile) if tile else None, "us": time["us"] / copies, "error": error})
    unasked, rest = found[0], sorted(found[1:], key=lambda each: each["us"])
    return {"unasked": unasked, "best": rest[:5], "tried": len(rest), "left_out": len(left_out), "why": left_out[:2]}
