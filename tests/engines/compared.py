"""What an engine made of the checkpoints, held against what transformers did. Needs nothing but Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BASE = Path(os.environ.get("ENGINES_BASE", "."))
# Of a tiny model, in float32 on both sides; of a real one in bfloat16, as a multiple of transformers' own error.
EXACT, WITHIN = 2e-4, 2.0
# Of packed linears, which round what they read to int8: a change of 2e-7 of the embedding makes 1.3e-4 in transformers
# itself, and 0.01 at most, as some numbers fall to another side.
ROUNDED, MOST_ROUNDED = 2e-3, 0.9
# A tie of two logits may fall either way in bfloat16, and the text goes on differently: so many of the real model's
# texts must be the same.
MOST_TEXTS = 0.5


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
    if wanted["bfloat16"] is None:
        assert row["difference"] < ROUNDED and same >= MOST_ROUNDED * len(follow), row
    elif wanted["dtype"] == "float32":
        assert row["largest"] < EXACT and same == len(follow), row
    else:
        assert row["difference"] < WITHIN * wanted["bfloat16"] and same >= MOST_TEXTS * len(follow), row
    return row


def answered(worker: str, folder: str, encoder: bool = False, **how: Any) -> list[dict[str, Any]]:
    """What the process that `llmsurgeon bench` starts says of a checkpoint, and the seconds of two requests."""
    asked = {
        "folder": folder,
        "encoder": encoder,
        "batch": 2,
        "positions": 24,
        "share": 0.9,
        "trust_remote_code": False,
    }
    asked |= {"threads": 1, "dtype": "float32", "type": None, **how}
    file = Path(__file__).resolve().parents[2] / "llmsurgeon" / "workers" / worker
    requests = "".join(json.dumps([[[5] * 16] * 2, 0 if encoder else 7]) + "\n" for _ in range(2))
    made = subprocess.run(
        [sys.executable, str(file), json.dumps(asked)],
        input=requests,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    found = [json.loads(line) for line in made.stdout.splitlines()]
    assert len(found) == 3 and "error" not in found[-1], (found, made.stderr[-2000:])
    assert all(each["prefill"] > 0 and (encoder or each["decode"] > 0) for each in found[1:])
    return found
