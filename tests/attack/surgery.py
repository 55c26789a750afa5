"""What a checkpoint of ours carries beside its weights: surgery.json, recipe.yaml, checksums, the card."""

from __future__ import annotations

import re
from random import Random

from tests.attack.commands import command
from tests.attack.configs import parent_of
from tests.attack.mutations import mutated_json, raw
from tests.attack.scene import Scene, Verdict

KEYS = ("steps", "parent", "blocks", "evaluation", "format", "version", "layers", "op", "", "n" * 300, "\ud800")
SUMS = ("checksums.b3", "checksums.sha256", "checksums.none")


def attempt(draw: Random, scene: Scene) -> Verdict:
    name = draw.choice(("fused", "surgeon", "ternary", "mlgru", "block", "fff", "nas"))
    folder = scene.copy(name, "model")
    files = [
        file
        for file in sorted(folder.iterdir())
        if file.suffix not in (".safetensors", ".py") and "token" not in file.name
    ]
    ours = [file for file in files if file.name in ("surgery.json", "recipe.yaml", *SUMS)]
    file = draw.choice(ours if draw.random() < 0.8 else files)
    content = file.read_bytes()
    if draw.random() < 0.05:
        file.unlink()
        what = "gone"
    elif file.suffix == ".json":
        content, what = mutated_json(draw, content, KEYS)
        file.write_bytes(content)
    elif file.suffix == ".yaml" and draw.random() < 0.6:
        lines = content.decode().splitlines()
        at = draw.randrange(len(lines))
        key = lines[at].partition(":")[0]
        value = draw.choice(("null", "7", "[]", "{}", "nonsense", "-1", ".nan", "&a [*a]", "!!python/none x", "'"))
        lines[at] = f"{key}: {value}"
        file.write_text("\n".join(lines))
        what = lines[at][:60]
    else:
        made, what = raw(draw, content)
        file.write_bytes(made)
    if draw.random() < 0.7 and file.name not in SUMS:
        # Without its sums the folder is read as one that somebody has edited.
        for sums in SUMS:
            (folder / sums).unlink(missing_ok=True)
    what = re.sub(r"\s+", " ", what)
    return scene.check(command(draw, scene, "model", parent_of(name)), f"{name}/{file.name}: {what}")
