"""What a search of a small model might have found, as report.json has it: every kind of point, option and note."""

from __future__ import annotations

import math
import random
from typing import Any

PARENT = (9, 3, 1536)
NAMES = {
    (9, 3, 1536): "as it is",
    (0, 0, 1536): "attention gone",
    (9, 3, 1152): "FFN 75 %",
    (9, 3, 768): "FFN 50 %",
    (6, 2, 1152): "6 of 9 heads, FFN 75 %",
    (9, 1, 1536): "KV heads 3 to 1",
    (0, 0, 768): "attention gone, FFN 50 %",
    (): "layer gone",
}


def found(layers: int = 30, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A report of a search for 1.3 times the decode speed, and 0.8 of the memory."""
    draw = random.Random(seed)
    chosen = [*_layers(layers, draw)]
    return {
        "version": 1,
        "model": "HuggingFaceTB/SmolLM2-135M",
        "engine": "llama.cpp:q8_0",
        "text": "self-generated",
        "tokens": 65536,
        "sequence_length": 512,
        "operations": ["prune_attention", "prune_heads", "prune_ffn", "prune_blocks", "fuse_ffn"],
        "parent": [list(PARENT)] * layers,
        "bounds": [
            _bound("decode", "1.3x", "a step", 0.0104, 1.3, 0.0103, 0.01038, 1.34),
            _bound("memory", "0.8x", "B", 155e6, 1 / 0.8, 0.792 * 155e6, 0.792 * 155e6, 0.792),
        ],
        "options": [],
        "layers": chosen,
        "table": {
            "rows": 24576,
            "parent": 49152,
            "kl": 0.0123,
            "others": [["as it is", 0.0], ["36,864 rows", 0.0041]],
            "costs": {"decode": 0.118, "memory": 0.2},
        },
        "points": _points(draw),
        "timings": {"score options": 611.0, "costs": 184.0, "whole models": 402.0, "making": 71.0},
        "notes": ["3 of 17 other models that were measured are no worse than the chosen one as far as text can tell"],
        **changes,
    }


def _bound(name: str, asked: str, unit: str, parent: float, *costs: float) -> dict[str, Any]:
    over, predicted, measured, ratio = costs
    return {
        "target": f"{name}={asked}",
        "name": name,
        "unit": unit,
        "budget": parent / over,
        "parent": parent,
        "predicted": predicted * (0.77 if name == "decode" else 1),
        "measured": measured * (0.75 if name == "decode" else 1),
        "ratio": ratio,
    }


def _layers(layers: int, draw: random.Random):
    layer = 0
    while layer < layers:
        if layer == layers // 2 and layers > 6:
            yield _entry([layer, layer + 1, layer + 2], "FFNs as one", [(9, 3, 3584)], 0.021, draw)
            layer += 3
            continue
        stands = draw.choice(list(NAMES)) if 0 < layer < layers - 1 else PARENT
        kl = 0.0 if stands == PARENT else 0.004 * math.exp(draw.gauss(0, 0.8))
        yield _entry([layer], NAMES[stands], [stands] if stands else [], kl, draw)
        layer += 1


def _entry(layers: list[int], name: str, stands: list[Any], kl: float, draw: random.Random) -> dict[str, Any]:
    left = sum(0.0001 * s[0] + 0.0003 * s[2] for s in stands) / (len(layers) * (0.0009 + 0.4608))
    others = [[other, kl + 0.002 * k] for k, other in enumerate(draw.sample(list(NAMES.values())[1:], 3), 1)]
    return {
        "layers": layers,
        "name": name,
        "kl": kl,
        "others": others,
        "stands": [list(s) for s in stands],
        "costs": {"decode": left, "memory": left},
    }


def _points(draw: random.Random) -> list[dict[str, Any]]:
    def point(kind: str, name: str, decode: float, kl: float | None, **more: Any) -> dict[str, Any]:
        low, high = (None, None) if kl is None else (0.93 * kl, 1.07 * kl)
        ratios = {"decode": decode, "memory": 1.04 / decode}
        return {
            "kind": kind,
            "name": name,
            "ratios": ratios,
            "kl": kl,
            "low": low,
            "high": high,
            "predicted": None,
            "perplexity": None,
            "chosen": False,
            "ratio_low": {},
            "ratio_high": {},
            **more,
        }

    made = []
    for _ in range(26):
        speed = draw.uniform(1.12, 1.42)
        kl = 0.9 * (speed - 1) ** 1.5 * math.exp(draw.gauss(0.1, 0.12))
        made.append(point("measured", "19 of 30 layers changed", speed, kl, predicted=kl * draw.uniform(0.6, 1.0)))
    made.append(
        point(
            "made",
            "searched",
            1.34,
            0.142,
            predicted=0.121,
            perplexity=1.14,
            chosen=True,
            ratio_low={"decode": 1.32},
            ratio_high={"decode": 1.36},
        )
    )
    singles = {
        "attention-drop": 0.31,
        "shortgpt": 1.1,
        "deeper-layers": 1.4,
        "minitron-width": 0.74,
        "smollm2-fused": 0.55,
        "uniform width": 0.36,
    }
    made += [
        point("single", name, 1.3 + draw.uniform(-0.02, 0.02), kl, perplexity=1 + kl) for name, kl in singles.items()
    ]
    made.append(point("quantised", "parent at Q4_0", 1.21, 0.06, perplexity=1.05))
    made.append(point("parent", "parent", 1.0, 0.0))
    return made
