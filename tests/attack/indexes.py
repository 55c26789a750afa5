"""model.safetensors.index.json, and the shards that it names."""

from __future__ import annotations

import json
import os
from random import Random

from tests.attack.commands import command
from tests.attack.mutations import mutated_json
from tests.attack.scene import Scene, Verdict

KEYS = ("", "weight_map", "metadata", "model.norm.weight", "../x", "n" * 300, "\0", "\ud800")


def attempt(draw: Random, scene: Scene) -> Verdict:
    folder = scene.copy("sharded", "model")
    index = folder / "model.safetensors.index.json"
    shards = sorted(folder.glob("model-*.safetensors"))
    shard = draw.choice(shards)
    match draw.choice(("json", "json", "json", "json", "name", "gone", "swapped", "twice", "folder", "unreadable")):
        case "json":
            content, what = mutated_json(draw, index.read_bytes(), KEYS)
            index.write_bytes(content)
        case "name":
            name = draw.choice(
                (
                    "../x.safetensors",
                    "/dev/zero",
                    "\0",
                    "n" * 300,
                    "",
                    ".",
                    "sub/x.safetensors",
                    "\ud800",
                    "config.json",
                )
            )
            data = json.loads(index.read_bytes())
            data["weight_map"] = {
                key: name if value == shard.name else value for key, value in data["weight_map"].items()
            }
            index.write_text(json.dumps(data))
            what = f"a shard is called {name[:30]!r}"
        case "gone":
            shard.unlink()
            what = f"{shard.name} gone"
        case "swapped":
            other = draw.choice(shards)
            first, second = shard.read_bytes(), other.read_bytes()
            shard.write_bytes(second)
            other.write_bytes(first)
            what = f"{shard.name} and {other.name} swapped"
        case "twice":
            draw.choice(shards).write_bytes(shard.read_bytes())
            what = f"{shard.name} twice"
        case "folder":
            shard.unlink()
            shard.mkdir()
            what = f"{shard.name} is a folder"
        case _:
            draw.choice((shard, index)).unlink()
            os.symlink(
                draw.choice(("loop", "/nonexistent", "/etc/passwd", shard.name)), shard if not shard.exists() else index
            )
            what = "a link that leads nowhere good"
    return scene.check(command(draw, scene, "model"), what)
