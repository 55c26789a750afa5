"""Files of a checkpoint, a recipe or a text that are something else: pipes, devices, folders, links, nothing."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from random import Random

from tests.attack.commands import command
from tests.attack.configs import parent_of
from tests.attack.scene import Scene, Verdict

MODELS = ("llama", "sharded", "bytelevel", "fused", "surgeon", "f32.gguf")
NAMES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja",
    "model.safetensors", "model.safetensors.index.json", "adapter_config.json", "recipe.yaml", "surgery.json",
    "checksums.b3", "checksums.sha256", "checksums.none",
    "modeling_surgeon_qwen3.py", "tokenizer.model", "added_tokens.json", "vocab.json",
)  # fmt: skip
KINDS = (
    "pipe",
    "socket",
    "folder",
    "nothing",
    "empty",
    "dead link",
    "own link",
    "zeros",
    "null",
    "link to a folder",
    "other case",
)


def attempt(draw: Random, scene: Scene) -> Verdict:
    name = draw.choice(MODELS)
    model = scene.copy(name, "model.gguf" if name.endswith("gguf") else "model")
    arguments = command(
        draw, scene, model.name, "bytelevel" if "gguf" in name or name == "bytelevel" else parent_of(name)
    )
    victims = [scene.work / other for other in ("text.txt", "recipe.yaml") if (scene.work / other).exists()]
    if model.is_dir():
        shards = sorted(path.name for path in model.glob("*.safetensors"))
        own = model / draw.choice((*NAMES, *shards, *shards))
        victim = draw.choice((own, own, own, *victims))
    else:
        victim = draw.choice((model, *victims))
    kind = draw.choice(KINDS)
    become(victim, kind)
    return scene.check(arguments, f"{name}: {victim.name} is {kind}")


def become(path: Path, kind: str) -> None:
    """Put something of this kind in a file's place."""
    if kind == "other case" and path.exists():
        path.rename(path.with_name(path.name.upper()))
        return
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        before = Path.cwd()
        os.chdir(path.parent)  # the names of sockets are short
        try:
            socket.socket(socket.AF_UNIX).bind(path.name)
        finally:
            os.chdir(before)
    elif kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind != "nothing":
        leads = {"dead link": "nobody", "own link": path.name, "zeros": "/dev/zero", "null": "/dev/null"}
        path.symlink_to(leads.get(kind, "/tmp"))
