"""Nothing is changed: every verb over every form, since tracebacks need no damaged input."""

from __future__ import annotations

from random import Random

from tests.attack.commands import command
from tests.attack.configs import MODELS, parent_of
from tests.attack.scene import Scene, Verdict


def attempt(draw: Random, scene: Scene) -> Verdict:
    name = draw.choice((*MODELS, "bytelevel", "sharded", "f32.gguf", "q8.gguf"))
    model = scene.copy(name, "model.gguf" if name.endswith("gguf") else "model").name
    parent = "bytelevel" if name.endswith("gguf") or name == "bytelevel" else parent_of(name)
    return scene.check(command(draw, scene, model, parent), name)
