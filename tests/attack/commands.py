"""Command lines of every verb over a model that lies in the working folder."""

from __future__ import annotations

from random import Random

from tests.attack.ground import SMALL
from tests.attack.scene import Scene

SHORT = ("--tokens", "128", "--seq-len", "16")
SIZES = ("--prompt", "8", "--new-tokens", "2", "--rounds", "1")


def _text(draw: Random, scene: Scene) -> list[str]:
    """Options that name a text; a quarter of the time none, so that the model is sampled."""
    if draw.random() < 0.25:
        return []
    scene.copy("text.txt")
    return ["--text", "text.txt"]


def command(draw: Random, scene: Scene, model: str, parent: str | None = None) -> list[str]:
    """One command over `model`, drawn. `parent`: what is healthy and of the same vocabulary ("llama" if not given)."""
    verb = draw.choice(VERBS)
    return verb(draw, scene, model, parent or "llama")


def _inspect(draw: Random, scene: Scene, model: str, parent: str) -> list[str]:
    return ["inspect", model, *draw.choice(([], ["--json"]))]


def _verify(draw: Random, scene: Scene, model: str, parent: str) -> list[str]:
    return ["verify", model, *draw.choice(([], ["--json"]))]


def _run(draw: Random, scene: Scene, model: str, parent: str) -> list[str]:
    scene.copy("recipe.yaml")
    scene.copy("text.txt")
    return ["run", "recipe.yaml", model, "-o", "OUT", *draw.choice(([], ["--dry-run"]))]


def _plan(draw: Random, scene: Scene, model: str, parent: str) -> list[str]:
    steps = (
        ["prune", model, "--blocks", "1"],
        ["prune", model, "--width", "64", "--no-refit"],
        ["prune", model, "--kv-heads", "1", "--no-refit"],
        ["fuse", model, "--drop-attention", "2", "--no-refit"],
        ["matmulfree", model, "--layers", "1", "--no-refit"],
        ["block", model, "--no-refit"],
        ["ternary", model, "--method", "round", "--linears", draw.choice(("ffn", "attention", "all"))],
    )
    return [*draw.choice(steps), "-o", "OUT", *SMALL, *draw.choice(([], [], ["--dry-run"]))]


def _measured(draw: Random, scene: Scene, model: str, parent: str) -> list[str]:
    steps = (
        ["fuse", model, "--drop-count", "1"],
        ["prune", model, "--block-count", "1"],
        ["ternary", model, "--share", "0.5"],
        ["matmulfree", model, "--count", "1"],
        ["fff", model, "--depth", "1", "--leaf-width", "32"],
    )
    return [*draw.choice(steps), "-o", "OUT", *_text(draw, scene), *SMALL]


def _trim(draw: Random, scene: Scene, model: str, parent: str) -> list[str]:
    scene.copy("trim.yaml")
    return ["run", "trim.yaml", model, "-o", "OUT"]


def _heal(draw: Random, scene: Scene, model: str, parent: str) -> list[str]:
    healthy = str(scene.copy(parent, "healthy").name)
    student, taught = (model, healthy) if draw.random() < 0.6 else (healthy, model)
    sets = ["distill.steps=2", "distill.tokens=128", "distill.sequence_length=16", "distill.batch=2"]
    return ["heal", student, "--parent", taught, "-o", "OUT", "--minutes", "0.02", *_text(draw, scene), *_sets(sets)]


def _sets(changes: list[str]) -> list[str]:
    return [part for change in changes for part in ("--set", change)]


def _analyze(draw: Random, scene: Scene, model: str, parent: str) -> list[str]:
    return ["analyze", model, "-o", "OUT", *SHORT, *_text(draw, scene), *draw.choice(([], ["--json"]))]


def _eval(draw: Random, scene: Scene, model: str, parent: str) -> list[str]:
    against = ["--against", scene.copy(parent, "healthy").name] if draw.random() < 0.5 else []
    return ["eval", model, *against, *SHORT, *_text(draw, scene), *draw.choice(([], ["--json"]))]


def _bench(draw: Random, scene: Scene, model: str, parent: str) -> list[str]:
    return ["bench", model, *SIZES]


def _export(draw: Random, scene: Scene, model: str, parent: str) -> list[str]:
    form = draw.choice(("native", "surgeon", "nemotron-nas", "bitnet", "gguf", "gguf"))
    return ["export", model, "--to", form, "-o", "OUT.gguf" if form == "gguf" else "OUT"]


VERBS = (_inspect, _verify, _run, _plan, _measured, _trim, _heal, _analyze, _eval, _bench, _export)
