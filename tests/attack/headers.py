"""The header of model.safetensors, and the file's length."""

from __future__ import annotations

import struct
from random import Random

from tests.attack.commands import command
from tests.attack.ground import pick
from tests.attack.mutations import mutated_json, raw
from tests.attack.scene import Scene, Verdict

KEYS = (
    "",
    "__metadata__",
    "model.norm.weight",
    "lm_head.weight",
    "dtype",
    "shape",
    "data_offsets",
    "n" * 300,
    "\0",
    "\ud800",
)


def attempt(draw: Random, scene: Scene) -> Verdict:
    name = pick(draw, "llama", "qwen3", "bert", "fused")
    file = scene.copy(name, "model") / "model.safetensors"
    content = file.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header, body = content[8 : 8 + size], content[8 + size :]
    kind = draw.choice(("json", "json", "json", "length", "body", "all"))
    if kind == "json":
        header, what = mutated_json(draw, header, KEYS)
        content = struct.pack("<Q", len(header)) + header + body
    elif kind == "length":
        claimed = draw.choice((0, 1, size - 1, size + 1, len(content), 2**31, 2**63 - 1, 2**64 - 1, 100_000_001))
        content, what = struct.pack("<Q", claimed) + header + body, f"header length {claimed}"
    elif kind == "body":
        body, what = raw(draw, body)
        content = content[: 8 + size] + body
    else:
        content, what = raw(draw, content)
    file.write_bytes(content)
    scene.source = "model"
    return scene.check(command(draw, scene, "model", name), f"{name}: {what}")
