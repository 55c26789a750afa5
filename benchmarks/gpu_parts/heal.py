"""Healing at a card's pace: a model cut to 22 of 30 blocks, and block transformers of it, distilled on sampled text.

    python benchmarks/gpu.py --part heal --model SMOLLM2 --text WIKI.txt --text NEWS.txt --seconds 1500

The parent samples what is trained on; minutes of training, and perplexity ratios to the parent before and after on
each text that judges. Without --model a tiny random one runs through the same commands, and its figures say nothing.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_parts import made
from gpu_parts.made import brief
from gpu_parts.timing import Setting

MINUTES = 5.0


def rows(setting: Setting) -> Iterator[dict[str, Any]]:
    """Each student as it came, and healed."""
    with tempfile.TemporaryDirectory(prefix="llmsurgeon-gpu-") as name:
        folder = Path(name)
        tiny = setting.model is None
        parent = made.llama(folder / "parent", 6, tiny=True) if tiny else Path(str(setting.model))
        texts = [Path(each) for each in setting.texts] or [made.text(folder / "text.txt", 4000)]
        for student, command in list(students(tiny).items())[: 2 if setting.dry else None]:
            cut = made.llmsurgeon(*command, parent, "-o", folder / student, "--device", setting.device.type)
            yield {"student": student, "what": "cut", "model": parent.name, **brief(cut)}
            yield {"student": student, "what": "as it came", **judged(setting, folder / student, parent, texts)}
            healed = folder / f"{student}-healed"
            how = made.llmsurgeon(
                "heal", folder / student, "--parent", parent, "-o", healed, *training(setting, tiny, student)
            )
            yield {"student": student, "what": "heal", **brief(how)}
            yield {"student": student, "what": "healed", **judged(setting, healed, parent, texts)}


def students(tiny: bool) -> dict[str, tuple[object, ...]]:
    """The commands that cut, without model and folder."""
    short = ("--tokens", 128, "--seq-len", 16) if tiny else ()
    first = {"fused": ("fuse", "--drop-count", 2 if tiny else 8, "--max-run", 3, *short)}
    blocks = {f"blocks of {length}": ("block", "--set", f"block.block_length={length}", *short) for length in (2, 4)}
    return first | blocks


def training(setting: Setting, tiny: bool, student: str) -> tuple[object, ...]:
    """Flags of `heal`."""
    if tiny:
        sizes = ("calibration.tokens=128", "calibration.sequence_length=16", "distill.steps=2", "distill.tokens=512")
        length = ("distill.sequence_length=16",)
    else:
        sizes, length = ("distill.precision=bfloat16",), ()
    if student.startswith("blocks"):
        # Its layers stand for none of the parent's.
        sizes = (*sizes, "distill.hidden=0", "distill.cross_entropy=1")
    sets = tuple(word for each in (*sizes, *length) for word in ("--set", each))
    minutes = () if tiny else ("--minutes", 1.5 if setting.quick else MINUTES)
    return (*sets, *minutes, "--device", setting.device.type)


def judged(setting: Setting, student: Path, parent: Path, texts: list[Path]) -> dict[str, Any]:
    """Perplexity ratio and its interval on each text."""
    found: dict[str, Any] = {}
    sizes = ("--tokens", "64", "--seq-len", "16") if setting.model is None else ("--tokens", "16384")
    for text in texts:
        asked = ("eval", student, "--against", parent, "--json", "--text", text, *sizes)
        done = made.llmsurgeon(*asked, "--device", setting.device.type)
        if done["code"]:
            found[text.name] = done
            continue
        said = json.loads(done["out"])
        found[text.name] = {key: value for key, value in _flat(said).items() if "perplexity" in key or key == "kl"}
    return found


def _flat(value: dict[str, Any]) -> dict[str, Any]:
    """A report's innermost entries by their own names."""
    found: dict[str, Any] = {}
    for key, each in value.items():
        found |= _flat(each) if isinstance(each, dict) else {key: each}
    return found
