"""Command lines: values of every option, names of models and of outputs, and the environment."""

from __future__ import annotations

import os
from random import Random

from tests.attack.ground import SMALL
from tests.attack.mutations import HUGE
from tests.attack.scene import Scene, Verdict

NUMBERS = (
    "0",
    "-1",
    "1",
    "2",
    "100000",
    "4294967296",
    "9223372036854775808",
    HUGE,
    "1e3",
    "0.5",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "",
    " 7",
    "٣",
    "x",
    "0x10",
)
WORDS = (
    "", "nonsense", "cuda", "cuda:99", "cpu:7", "meta", "mps", "xpu", "float64", "int8", "float8_e4m3fn", "1-", "-1",
    "0-99999999999", "3-1", "1,,2", ",",
    "\ud800", "o\udcff", "\x1b[31m", "[/x]", "n" * 5000, "../x", "/", "~nobody", "0,1,2,3", "1.5", "٣", "²",
)  # fmt: skip
SIZES = ("0", "-5GB", "5XB", "1e9", "", "nan", HUGE, "0.0001KB", "5 GB", "1KB", "999999999999TB")
NAMES = (
    "", ".", "..", "/", "nobody", "no/body", "a/b/c", "n" * 300, "n/" * 2000, "\ud800", "\x1b[31m", "[/x]",
    "llama/config.json", "llama/model.safetensors", "/dev/null",
    "/dev/zero", "text.txt", "~nobody", "~", "x.gguf", "https://example.com/x", "llama\n", "﷽/🤷", "model.bin",
    "llama/tokenizer.json",
)  # fmt: skip
OUTS = (
    "", ".", "..", "/", "llama", "llama/x", "text.txt", "text.txt/x", "nobody/x", "n" * 254, "n" * 300, "/proc/x",
    "/dev/null", "\ud800", "\x1b[31m", "[/x]", "~nobody/x", "ﬁ﷽", "OUT/",
    "-x", "OUT.partial", "a\nb",
)  # fmt: skip
# Options of each verb: "n" takes a number, "w" a word, "s" a size, "m" a model, "o" what is written, "t" a text.
VERBS: dict[tuple[str, ...], dict[str, str]] = {
    ("analyze", "@model", "--tokens", "128", "--seq-len", "16"): {
        "--tokens": "n", "--seq-len": "n", "--drop": "n", "--max-run": "n", "--seed": "n", "--device": "w",
        "--dtype": "w", "--batch": "n", "--text": "t",
        "--dataset": "w", "--revision": "w", "-o": "o",
    },
    ("bench", "@model", "--prompt", "8", "--new-tokens", "2", "--rounds", "1"): {
        "--batch": "n", "--prompt": "n", "--new-tokens": "n", "--rounds": "n", "--threads": "n", "--device": "w",
        "--dtype": "w", "--type": "w", "--engine": "w",
        "--against": "m",
    },
    ("eval", "@model", "--tokens", "128", "--seq-len", "16"): {
        "--tokens": "n", "--seq-len": "n", "--tasks": "w", "--device": "w", "--dtype": "w", "--text": "t",
        "--dataset": "w", "--against": "m", "--revision": "w",
    },
    ("export", "@model", "--to", "gguf"): {"--type": "w", "--float-type": "w", "--pre": "w", "-o": "o",
    "--max-shard-size": "s", "--to": "w"},
    ("export", "@model", "--to", "surgeon"): {"--linear-class": "w", "-o": "o", "--max-shard-size": "s", "--type": "w"},
    ("fuse", "@model", *SMALL): {
        "--drop-attention": "w", "--drop-count": "n", "--runs": "w", "--max-run": "n", "--norm": "w", "--tokens": "n",
        "--seq-len": "n", "--device": "w", "--dtype": "w",
        "--max-shard-size": "s", "-o": "o", "--text": "t", "--set": "w", "--recipe": "t",
    },
    ("prune", "@model", "--no-refit", *SMALL): {
        "--attention": "w", "--ffn": "w", "--blocks": "w", "--block-count": "n", "--kv-heads": "n", "--width": "n",
        "-o": "o", "--max-shard-size": "s", "--seq-len": "n",
    },
    ("ternary", "@model", "--method", "round", *SMALL): {
        "--linears": "w", "--layers": "w", "--share": "n", "--max-bytes": "n", "--method": "w", "--scale": "w",
        "--granularity": "w", "--group-size": "n", "-o": "o",
    },
    ("fff", "@model", "--depth", "1", *SMALL): {"--form": "w", "--keep": "n", "--depth": "n", "--leaf-width": "n",
    "--shared": "n", "--trees": "n", "--layers": "w", "-o": "o"},
    ("matmulfree", "@model", *SMALL): {"--layers": "w", "--keep-attention": "w", "--count": "n", "--linears": "w",
    "--context": "n", "-o": "o"},
    ("block", "@model", *SMALL): {"--block-length": "n", "--split": "n", "--embedder": "w", "--decoder": "w",
    "--prefix-length": "n", "--minutes": "d", "-o": "o"},
    ("heal", "@model", "--parent", "llama", "--minutes", "0.01", "--set", "distill.sequence_length=16", "--set",
    "distill.batch=2"): {
        "--minutes": "d", "--recipe": "t", "--text": "t", "--device": "w", "--dtype": "w", "-o": "o",
        "--max-shard-size": "s", "--parent": "m", "--set": "w",
    },
    ("run", "recipe.yaml", "@model"): {"--tokens": "n", "--seq-len": "n", "--device": "w", "--dtype": "w", "-o": "o",
    "--set": "w", "--max-shard-size": "s", "--text": "t"},
    ("inspect", "@model"): {"--revision": "w"},
    ("verify", "@model"): {},
    ("recipes", "show", "@recipe"): {},
    ("recipes", "cp", "shortgpt", "@out"): {},
    ("recipes", "check", "@recipe"): {"--set": "w"},
}  # fmt: skip
SETS = (
    "distill.learning_rate", "distill.tokens", "distill.batch", "distill.steps", "distill.sequence_length",
    "distill.warmup", "distill.weight_decay", "distill.temperature",
    "distill.optimizer", "distill.schedule", "distill.save_minutes", "refit.ridge", "refit.tokens",
    "calibration.tokens", "calibration.sequence_length", "calibration.seed",
    "fuse_ffn.max_run", "gate.max_kl",
)  # fmt: skip
# Of minutes those that are refused or soon over: to train for the others is what was asked for.
DURATIONS = tuple(number for number in NUMBERS if number not in ("1", "2", "100000", "1e3"))
DRAWN = {"n": NUMBERS, "d": DURATIONS, "w": WORDS, "s": SIZES, "m": NAMES, "o": OUTS, "t": NAMES}
WRITERS = ("analyze", "export", "fuse", "prune", "ternary", "fff", "matmulfree", "block", "heal", "run")


def attempt(draw: Random, scene: Scene) -> Verdict:
    model = scene.copy("llama").name
    scene.copy("text.txt")
    scene.copy("recipe.yaml")
    shape = draw.choice(list(VERBS))
    options = VERBS[shape]
    arguments = list(shape)
    changed = draw.sample(list(options), min(len(options), draw.choice((1, 1, 1, 2))))
    if draw.random() < 0.15:
        changed, model = [], draw.choice(NAMES)
    for option in changed:
        value = draw.choice(DRAWN[options[option]])
        if option == "--set":
            value = f"{draw.choice(SETS)}={draw.choice((*NUMBERS, *WORDS))}"
        arguments += [f"{option}={value}"] if option.startswith("--") else [option, value]
    filled = {"@model": model, "@recipe": draw.choice(NAMES), "@out": draw.choice(OUTS)}
    arguments = [filled.get(word, word) for word in arguments]
    if shape[0] in WRITERS and "-o" not in changed:
        arguments += ["-o", "OUT"]
    what = " ".join(arguments[len(shape) :]) if changed else f"model {model[:40]!r}"
    if draw.random() < 0.15:
        arguments, what = _odd_line(draw, arguments), "the line itself"
    if draw.random() < 0.15:
        what += f"; {_surroundings(draw, scene)}"
    return scene.check([word.replace("\0", "") for word in arguments], what[:200])


def _odd_line(draw: Random, arguments: list[str]) -> list[str]:
    at = draw.randrange(len(arguments) + 1)
    odd = draw.choice(
        (
            ["--"],
            [""],
            ["-q"],
            ["--help"],
            ["--nonsense"],
            ["-"],
            ["\ud800"],
            ["--json"],
            ["--json", "--dry-run"],
            ["extra", "words"],
            ["--quiet=yes"],
        )
    )
    return arguments[:at] + odd + arguments[at + draw.choice((0, 0, 1)) :]


def _surroundings(draw: Random, scene: Scene) -> str:
    """Another environment for the command: what was changed."""
    changes: tuple[dict[str, str | None], ...] = (
        {"HOME": None, "LLMSURGEON_CACHE": None, "XDG_CACHE_HOME": None},
        {"HOME": "/nonexistent", "LLMSURGEON_CACHE": None, "XDG_CACHE_HOME": None},
        {"HOME": "", "LLMSURGEON_CACHE": None},
        {"LLMSURGEON_CACHE": "text.txt"},
        {"LLMSURGEON_CACHE": ""},
        {"LLMSURGEON_CACHE": "/proc/x"},
        {"COLUMNS": "x"},
        {"COLUMNS": "1"},
        {"COLUMNS": "-5"},
        {"TMPDIR": "/nonexistent"},
        {"LLMSURGEON_FFF_KERNEL": "nonsense"},
        {"WORLD_SIZE": "x"},
        {"TERM": None},
        {"PATH": None},
    )
    if draw.random() < 0.3:
        name = draw.choice((b"m\xff\xfe", "ﬁ e\u0301".encode(), b"a b", b"[x]", b"\x1b[31m", b"%s{0}"))
        moved = scene.work.with_name(os.fsdecode(name))
        scene.work.rename(moved)
        scene.name = moved.name
        return f"in a folder called {name!r}"
    chosen = draw.choice(changes)
    scene.environment.update(chosen)
    return ", ".join(f"{key}={value}" for key, value in chosen.items())
