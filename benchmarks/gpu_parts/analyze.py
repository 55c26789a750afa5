"""Seconds that an analysis and a refit take at Llama-3.1-8B's shape, computed on the card, and on its machine's CPU.

Random weights and a text of random letters: what they say is worth nothing, how long it takes is. The analysis has all
scores; the refit follows a cut of three layers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_parts import made
from gpu_parts.timing import Setting

LENGTH = 512


def rows(setting: Setting) -> Iterator[dict[str, Any]]:
    """An analysis, then a cut with its refit."""
    layers, tokens = (4, 64) if setting.dry else (8, 4096) if setting.quick else (32, 4096)
    length = 16 if setting.dry else LENGTH
    device = setting.device.type
    with tempfile.TemporaryDirectory(prefix="llmsurgeon-gpu-") as name:
        folder = Path(name)
        parent = made.llama(folder / "parent", layers, tiny=setting.dry)
        prose = made.text(folder / "text.txt", 6 * tokens)
        shared = ("--text", prose, "--tokens", tokens, "--seq-len", length, "--device", device)
        found = made.llmsurgeon("analyze", parent, "-o", folder / "analysis", *shared)
        yield {"what": "analyze", "layers": layers, "tokens": tokens, "device": device, **made.brief(found)}
        cut = ("--drop-attention", "1-3", "--runs", "1-3")
        found = made.llmsurgeon("fuse", parent, "-o", folder / "fused", *cut, *shared)
        yield {"what": "fuse and refit", "layers": layers, "tokens": tokens, "device": device, **made.brief(found)}
