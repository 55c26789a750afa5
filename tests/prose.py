"""Text of any length that no edit of the project changes: the licence's words, and words like them."""

from __future__ import annotations

import random
import re
from pathlib import Path

WORDS = re.findall(r"[A-Za-z]{2,}", (Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8"))


def sentences(count: int, seed: int) -> list[str]:
    """Lines of prose, and one of code in six; every tenth word is two halves of others."""
    choose = random.Random(seed)

    def word() -> str:
        drawn = choose.choice(WORDS)
        if choose.random() < 0.1:
            other = choose.choice(WORDS)
            drawn = drawn[: 1 + len(drawn) // 2] + other[len(other) // 2 :]
        return drawn

    def prose() -> str:
        drawn = [word() + choose.choice(["", "", "", "", ",", ";"]) for _ in range(choose.randint(4, 24))]
        number = f" ({choose.randint(0, 2100)})" if choose.random() < 0.2 else ""
        return " ".join(drawn).rstrip(",;").capitalize() + number + choose.choice([".", ".", ".", "?", ":"])

    def code() -> str:
        name, first, second = (word().lower() for _ in range(3))
        return choose.choice(
            [
                f"def {name}_{first}({second}: int = {choose.randint(0, 99)}) -> {first.capitalize()}:",
                f"    return self.{name}[{first}] + {choose.random():.3f} * {second}  # {word()}",
                f"| `{name}` | {choose.randint(1, 99)}.{choose.randint(0, 9)} | **{first}-{second}** |",
            ]
        )

    return [code() if choose.random() < 1 / 6 else prose() for _ in range(count)]
