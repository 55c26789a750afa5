"""Recipes: values, keys, YAML's own odds, and bytes."""

from __future__ import annotations

from pathlib import Path
from random import Random

from tests.attack.mutations import HUGE, ODD, raw
from tests.attack.scene import Scene, Verdict

BUILT_IN = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))
SCALARS = (
    "~", "", "yes", "0x10", "0o7", "1:30", "1_000", ".inf", "-.inf", ".nan", "1e400", HUGE, "2026-11-26",
    "!!python/object/apply:os.system ['x']",
    "!!binary aGk=", "!!set {a, b}", "!!timestamp 2026-01-01", "*nobody", "&a [*a]", "|\n  text", ">-\n  text", "'",
    '"', "[", "{", "}", "? x",
    "- - - x", "\t", "@x", "`x`", "%TAG ! x", "--- x\n--- y", "{<<: {a: 1}}", "{? [a]: b}", "{a: 1, a: 2}", 
    "{1: 2, null: 3, true: 4}", "[0-99999999999]",
    '["0-9999999999"]', '["-1"]', '["3-1"]', "[1e9]", "auto", "[[0, 1], [1, 2]]", "[[]]",
)  # fmt: skip
OPS = (
    "fuse_ffn", "parallel_blocks", "prune_attention", "prune_ffn", "prune_blocks", "prune_kv_heads", "prune_width",
    "refit", "distill",
    "ternary", "fff", "matmulfree", "block", "nonsense", "[]", "null", "1",
)  # fmt: skip


def attempt(draw: Random, scene: Scene) -> Verdict:
    scene.copy("llama")
    scene.copy("text.txt")
    file = draw.choice(BUILT_IN) if draw.random() < 0.3 else scene.ground["recipe.yaml"]
    source = file.read_text(encoding="utf-8")
    lines = source.splitlines()
    match draw.choice(("value", "value", "value", "value", "op", "line", "raw", "bomb", "deep", "set", "set")):
        case "value":
            content, what = _value(draw, lines)
        case "op":
            op = draw.choice(OPS)
            keys = (
                "layers",
                "count",
                "runs",
                "width",
                "kv_heads",
                "depth",
                "leaf_width",
                "share",
                "tokens",
                "minutes",
                "x",
                "group_size",
                "max_run",
            )
            key, value = draw.choice(keys), draw.choice((*SCALARS, *ODD))
            content, what = f"version: 1\nsteps:\n  - op: {op}\n    {key}: {value}\n", f"{op} {key}: {value[:40]}"
        case "line":
            at = draw.randrange(len(lines))
            other = draw.choice(
                ("", lines[at] + "\n" + lines[at], "  " + lines[at], lines[at].lstrip(), lines[at].replace(":", ""))
            )
            lines[at] = other
            content, what = "\n".join(lines), f"line {at + 1}: {other[:40]!r}"
        case "bomb":
            levels = draw.choice((3, 10, 30))
            made = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
            content, what = source + "\n".join(made), f"aliases of {levels} levels"
        case "deep":
            depth = draw.choice((50, 500, 5000, 100_000))
            content, what = f"version: 1\nsteps: {'[' * depth}{']' * depth}\n", f"{depth} lists"
        case "set":
            content, what = source, "--set"
        case _:
            content, what = "", ""
    made = content.encode("utf-8", "surrogatepass") if content else source.encode()
    if not content:
        made, what = raw(draw, made)
    (scene.work / "my.yaml").write_bytes(made)
    keys = (
        "calibration.tokens",
        "calibration",
        "refit.ridge",
        "steps",
        "steps[0]",
        "0.op",
        "",
        ".",
        "model",
        "version",
        "gate.max_kl",
        "fuse_ffn.runs",
    )
    value = draw.choice((*SCALARS, *ODD))
    sets = ["--set", f"{draw.choice(keys)}={value}"] if what == "--set" or draw.random() < 0.1 else []
    where = draw.choice((
        ["recipes", "check", "my.yaml", *sets], ["recipes", "show", "my.yaml"], ["run", "my.yaml", "llama",
        "--dry-run", *sets],
        ["run", "my.yaml", "llama", "-o", "OUT", "--text", "text.txt", *sets, "--tokens", "128", "--seq-len", "16"],
        ["fuse", "llama", "--recipe", "my.yaml", "--dry-run", *sets], ["heal", "llama", "--parent", "llama",
        "--recipe", "my.yaml", "--dry-run", *sets],
    ))  # fmt: skip
    return scene.check(where, what)


def _value(draw: Random, lines: list[str]) -> tuple[str, str]:
    places = [i for i, line in enumerate(lines) if ":" in line]
    at = draw.choice(places)
    key = lines[at].partition(":")[0]
    value = draw.choice((*SCALARS, *ODD))
    lines[at] = f"{key}: {value}"
    return "\n".join(lines), f"{key.strip()}: {value[:40]}"
