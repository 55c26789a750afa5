"""What an engine made of the checkpoints, held against what transformers did. Needs nothing but Python."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

BASE = Path(os.environ.get("ENGINES_BASE", "."))
# Of a tiny model, in float32 on both sides; of a real one in bfloat16, as a multiple of transformers' own error.
EXACT, WITHIN = 2e-4, 2.0
# A tie of two logits may fall either way in bfloat16, and the text goes on differently: so many of the real model's
# texts must be the same.
MOST_TEXTS = 0.5
# Of the speed: tokens that are generated, behind so many, and rounds after one to warm up.
BEHIND, STEPS, ROUNDS = 64, 48, 9
REAL = ("native-real", "nas-real")  # a real model, and what was made of it


def expected() -> dict[str, dict[str, Any]]:
    """What scripts/engines has written; empty where it has not run."""
    path = BASE / "expected.json"
    found: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def held(
    engine: str, name: str, code: str, logs: Sequence[Sequence[float]], follow: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Write down how far an engine is from transformers, and raise AssertionError where that is too far."""
    wanted = expected()[name]
    pairs = [
        (a, b) for mine, theirs in zip(logs, wanted["logs"], strict=True) for a, b in zip(mine, theirs, strict=True)
    ]
    off = [abs(a - b) for a, b in pairs]
    same = sum(list(a) == list(b) for a, b in zip(follow, wanted["follow"], strict=True))
    row = {"engine": engine, "name": name, "code": code, "difference": sum(off) / len(off), "same": same}
    row |= {"texts": len(follow), "bfloat16": wanted["bfloat16"], "largest": max(off)}
    with (BASE / f"found-{engine}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    if wanted["dtype"] == "float32":
        assert row["largest"] < EXACT and same == len(follow), row
    else:
        assert row["difference"] < WITHIN * wanted["bfloat16"] and same >= MOST_TEXTS * len(follow), row
    return row


def raced(engine: str, code: str, generate: dict[str, Callable[[list[int], int], object]]) -> None:
    """Time both real models in turn and write down how fast they decode; `generate`: (prompt, new tokens) of each."""
    prompt = (expected()[REAL[0]]["prompts"][0] * BEHIND)[:BEHIND]
    ratios, seconds = [], {name: [] for name in REAL}
    for counted in [False] + [True] * ROUNDS:
        took = {}
        for name in REAL:
            # Reading the prompt is in both, and taken off.
            times = []
            for new in (1, 1 + STEPS):
                start = time.perf_counter()
                generate[name](prompt, new)
                times.append(time.perf_counter() - start)
            took[name] = (times[1] - times[0]) / STEPS
        if counted:
            ratios.append(took[REAL[0]] / took[REAL[1]])
            for name in REAL:
                seconds[name].append(took[name])
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    speeds = [1 / statistics.median(seconds[name]) for name in REAL]
    row = {"engine": engine, "name": REAL[1], "code": code, "speedup": [low, median, high], "tokens_per_second": speeds}
    with (BASE / f"raced-{engine}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
