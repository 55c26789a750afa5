"""Seconds that a conversion takes at Llama-3.1-8B's shape: attentions dropped, FFNs fused, weights streamed and hashed.

No text, so no forward pass: what is measured are the disk, hashing and folding, beside `cp -r` of the same folder.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_parts import made
from gpu_parts.timing import Setting


def rows(setting: Setting) -> Iterator[dict[str, Any]]:
    """One row."""
    layers = 6 if setting.dry else 8 if setting.quick else 32
    setting.device  # noqa: B018 - figures are a card's machine's
    with tempfile.TemporaryDirectory(prefix="llmsurgeon-gpu-") as name:
        folder = Path(name)
        parent = made.llama(folder / "parent", layers, tiny=setting.dry)
        size = sum(file.stat().st_size for file in parent.iterdir())
        start = time.monotonic()
        shutil.copytree(parent, folder / "copy")
        copied = time.monotonic() - start
        shutil.rmtree(folder / "copy")
        first = layers // 2
        run = f"{first}-{first + 2}"
        cut = ("--drop-attention", run, "--runs", run, "--no-refit")
        found = made.llmsurgeon("fuse", parent, "-o", folder / "fused", *cut)
        yield {"what": "fuse", "layers": layers, "bytes": size, "cp_seconds": round(copied, 2), **made.brief(found)}
