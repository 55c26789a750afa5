"""How fast this machine is at what runs consist of, measured in a few seconds and kept for a day."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from llmsurgeon.checkpoint.checksums import CHECKSUMS
from llmsurgeon.checkpoint.kept import cache_folder, keep, kept
from llmsurgeon.errors import SurgeryError
from llmsurgeon.evaluation.agreement import kl_divergence, top1_agreement
from llmsurgeon.evaluation.perplexity import token_losses
from llmsurgeon.healing.refit.symmetric import add_gram, damped_solution, square_zeros
from llmsurgeon.text.self_text import BATCH, Draw, Sampling

DAY = 24 * 3600.0
# Sizes at which rates are taken: wide enough for what is small to count little, small enough for seconds.
WIDTH, TOKENS, SEQUENCE, FEATURES, VOCABULARY = 2048, 512, 512, 1024, 32_768
FILE_BYTES, BLOCK = 1 << 28, 1 << 24
ENOUGH = 0.8  # seconds for each rate


@dataclass(frozen=True)
class Rates:
    """What is done in a second.

    layers, sums, wide, solved: floating-point operations in forward passes of layers, in Gram matrices, in other
    float32 products, in solving. compared: numbers of logits. stepped: floating-point operations in layers that read a
    token of each sequence, as where text is sampled; drawn: numbers of logits from which tokens are drawn. read,
    read_again, written: bytes, from the disk, from memory, to the disk.
    """

    layers: float
    sums: float
    wide: float
    solved: float
    compared: float
    stepped: float
    drawn: float
    read: float
    read_again: float
    written: float


def rates(hidden: int, dtype: torch.dtype, device: str, folder: Path) -> Rates:
    """Of this machine, for models about so wide; `folder` is on the disk that is read and written.

    Raises:
        SurgeryError: the disk of `folder` cannot be written.
    """
    width = min(WIDTH, max(256, 1 << (hidden.bit_length() - 1)))
    torch_says = [version("torch"), torch.get_num_threads(), str(dtype), device, width, *Rates.__annotations__]
    disk = os.stat(folder).st_dev
    parts = json.dumps([platform.node(), platform.processor(), disk, *torch_says])
    path = None
    with suppress(OSError, SurgeryError):
        path = cache_folder("rates") / f"{sha256(parts.encode()).hexdigest()[:32]}.json"
        if path.is_file() and time.time() - path.stat().st_mtime < DAY and kept(path):
            return Rates(**json.loads(path.read_text()))
    found = Rates(**_computing(width, dtype, device), **_disk(folder))
    with suppress(OSError, SurgeryError):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            keep(path, lambda partial: Path(partial).write_text(json.dumps(asdict(found))))
    return found


def _computing(width: int, dtype: torch.dtype, device: str) -> dict[str, float]:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    shapes = [(3 * width, width), (width, width), (3 * width, width), (3 * width, width), (width, 3 * width)]
    weights = [random(*shape) * shape[1] ** -0.5 for shape in shapes]
    x, rows, logits = random(TOKENS // SEQUENCE, SEQUENCE, width), random(TOKENS, FEATURES), random(64, VOCABULARY)
    # As many sequences as text is sampled of at a time.
    apart, draw = random(BATCH, 1, width), Draw(Sampling(), torch.tensor([0]), 0, torch.device(device))
    gram, wide, targets = square_zeros(FEATURES, rows), rows.float(), torch.zeros(64, dtype=torch.long, device=device)

    def judge() -> None:
        token_losses(logits, targets)
        token_losses(logits, targets)
        kl_divergence(logits, logits)
        top1_agreement(logits, logits)

    with torch.no_grad():
        spread = wide.T @ wide
        damping = spread.diagonal().clone()
        # What is done, and how much of it.
        works: dict[str, tuple[Callable[[], object], float]] = {
            "layers": (lambda: _layer(x, weights), 2.0 * TOKENS * sum(weight.numel() for weight in weights)),
            "sums": (lambda: add_gram(gram, rows), float(TOKENS * FEATURES**2)),
            "wide": (lambda: wide.T @ wide, 2.0 * TOKENS * FEATURES**2),
            "solved": (lambda: damped_solution(spread, spread.clone(), damping), FEATURES**3 * (2 + 1 / 3)),
            "compared": (judge, float(logits.numel())),
            "stepped": (lambda: _layer(apart, weights), 2.0 * len(apart) * sum(weight.numel() for weight in weights)),
            "drawn": (lambda: draw(logits, None), float(logits.numel())),
        }
        return {name: amount / seconds_of(work, device) for name, (work, amount) in works.items()}


def _layer(x: Tensor, weights: list[Tensor]) -> Tensor:
    """A layer as most families have it, with every norm, residual sum and check that a walk makes."""
    qkv, out, gate, up, down = weights
    size, heads = x.shape[-1], x.shape[-1] // 64
    q, k, v = (part.unflatten(-1, (heads, 64)).transpose(1, 2) for part in F.linear(_norm(x), qkv).split(size, -1))
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    x = x + F.linear(attended, out)
    normed = _norm(x)
    inner = F.silu(F.linear(normed, gate)) * F.linear(normed, up)
    left = x + F.linear(inner, down)
    left.isfinite().all()
    return left.cpu()


def _norm(x: Tensor) -> Tensor:
    wide = x.float()
    return (wide * wide.square().mean(-1, keepdim=True).add(1e-6).rsqrt()).to(x.dtype)


def seconds_of(work: Callable[[], object], device: str) -> float:
    """Seconds of `work`, the least of those that fit into ENOUGH: what else the machine does makes them longer."""
    least, until = float("inf"), time.perf_counter() + ENOUGH
    while least == float("inf") or time.perf_counter() < until:
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        least = min(least, time.perf_counter() - began)
    return max(least, 1e-9)


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _disk(folder: Path) -> dict[str, float]:
    """Bytes a second of a file in `folder`, written with its checksum, read cold and read again."""
    block = os.urandom(BLOCK)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".llmsurgeon-rates-") as file:
            began, digest = time.perf_counter(), CHECKSUMS["blake3"].begin()
            for _ in range(FILE_BYTES // BLOCK):
                file.write(block)
                digest.update(block)
            file.flush()
            os.fsync(file.fileno())
            written = time.perf_counter() - began
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            times = []
            for _ in range(2):
                began = time.perf_counter()
                file.seek(0)
                while file.read(BLOCK):
                    pass
                times.append(time.perf_counter() - began)
    except OSError as error:
        raise SurgeryError(f"{folder}: its disk cannot be measured: {error.strerror}") from error
    return {"read": FILE_BYTES / times[0], "read_again": FILE_BYTES / times[1], "written": FILE_BYTES / written}
