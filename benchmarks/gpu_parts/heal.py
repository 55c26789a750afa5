"""Healing at a card's pace: a model cut to 22 of 30 blocks, and block transformers of it, distilled on sampled text.

    python benchmarks/gpu.py --part heal --model SMOLLM2 --text WIKI.txt --text NEWS.txt --seconds 1500

The parent samples what is trained on; minutes of training, and perplexity ratios to the parent before and after on
each text that judges. Without --model a tiny random one runs through the same commands, and its figures say nothing.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import queue
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_parts import made
from gpu_parts.made import brief
from gpu_parts.timing import Setting

MINUTES = 5.0
# Tokens that the parent writes to train on, and rows a step: a card is bored by the eight of a CPU.
SAMPLED, BATCH, RATE = 2_000_000, 128, 4e-4
# Of block transformers, which begin far from their parent.
BLOCK_RATE = 8e-4


def rows(setting: Setting) -> Iterator[dict[str, Any]]:
    """Each student as it came, and healed; one after the other, or all at once."""
    with tempfile.TemporaryDirectory(prefix="llmsurgeon-gpu-") as name:
        folder = Path(name)
        tiny = setting.model is None
        parent = made.llama(folder / "parent", 6, tiny=True) if tiny else Path(str(setting.model))
        texts = [Path(each) for each in setting.texts] or [made.text(folder / "text.txt", 4000)]
        ways = list(students(tiny).items())[: 2 if setting.dry else None]
        if setting.together and not tiny:
            # What they train on is sampled once.
            yield {"what": "sample", **brief(sampled(setting, folder, parent))}
        given = {student: (setting, folder, student, command, parent, texts) for student, command in ways}
        if setting.together:
            yield from side_by_side(given)
            return
        for student, each in given.items():
            for row in healed(*each):
                yield {"student": student, **row}


def side_by_side(given: dict[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Each student in a process of its own; together they share the card."""
    spawning = multiprocessing.get_context("spawn")
    found: Any = spawning.Queue()
    ways = [spawning.Process(target=tell, args=(found, *each), daemon=True) for each in given.items()]
    for way in ways:
        way.start()
    alive = True
    while alive:
        # One more look behind the end of all: what they said last is there by then.
        alive = any(way.is_alive() for way in ways)
        with contextlib.suppress(queue.Empty):
            while True:
                yield found.get(timeout=1)
    for student, way in zip(given, ways, strict=True):
        if way.exitcode:
            yield {"student": student, "failure": f"its process ended with {way.exitcode}"}


def tell(found: Any, student: str, given: tuple[Any, ...]) -> None:
    """Into the queue: what becomes of one student."""
    try:
        for row in healed(*given):
            found.put({"student": student, **row})
    except Exception:
        found.put({"student": student, "failure": traceback.format_exc()})


def sampled(setting: Setting, folder: Path, parent: Path) -> dict[str, Any]:
    """One step of training on what all of them train on."""
    student = folder / "first"
    cut = made.llmsurgeon(*students(False)["fused"], parent, "-o", student, "--device", setting.device.type, here=True)
    if cut["code"]:
        return cut
    words = [*training(setting, False, "fused"), "--set", "distill.steps=1", "--set", "distill.evaluations=0"]
    del words[words.index("--minutes") : words.index("--minutes") + 2]
    return made.llmsurgeon("heal", student, "--parent", parent, "-o", folder / "one-step", *words, here=True)


def healed(
    setting: Setting, folder: Path, student: str, command: tuple[object, ...], parent: Path, texts: list[Path]
) -> Iterator[dict[str, Any]]:
    """What becomes of one student."""
    tiny = setting.model is None
    cut = made.llmsurgeon(*command, parent, "-o", folder / student, "--device", setting.device.type, here=True)
    yield {"what": "cut", "model": parent.name, **brief(cut)}
    yield {"what": "as it came", **judged(setting, folder / student, parent, texts)}
    out = folder / f"{student}-healed"
    how = made.llmsurgeon(
        "heal", folder / student, "--parent", parent, "-o", out, *training(setting, tiny, student), here=True
    )
    yield {"what": "heal", **brief(how), "training": told(out)}
    yield {"what": "healed", **judged(setting, out, parent, texts)}


def told(out: Path) -> dict[str, Any]:
    """What the healed model's folder says of its training: steps, tokens, seconds, losses on held-out text."""
    found = [out / "surgery.json"]
    parts: list[Any] = [json.loads(file.read_text()) for file in found if file.exists()]
    while parts:
        part = parts.pop()
        if isinstance(part, dict) and part.get("trainings"):
            return dict(part["trainings"][0])
        parts += part.values() if isinstance(part, dict) else part if isinstance(part, list) else []
    return {}


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
        sizes = ("distill.precision=bfloat16", "distill.targets=memory", f"distill.data=[{{sampled: {SAMPLED}}}]")
        rate = BLOCK_RATE if student.startswith("blocks") else RATE
        length = (f"distill.batch={BATCH}", f"distill.learning_rate={rate}")
    if student.startswith("blocks"):
        # Its layers stand for none of the parent's.
        sizes = (*sizes, "distill.hidden=0", "distill.cross_entropy=1")
    sets = tuple(word for each in (*sizes, *length) for word in ("--set", each))
    minutes = () if tiny else ("--minutes", setting.minutes or (1.5 if setting.quick else MINUTES))
    return (*sets, *minutes, "--device", setting.device.type)


def judged(setting: Setting, student: Path, parent: Path, texts: list[Path]) -> dict[str, Any]:
    """Perplexity ratio and its interval on each text."""
    found: dict[str, Any] = {}
    sizes = ("--tokens", "64", "--seq-len", "16") if setting.model is None else ("--tokens", "16384")
    for text in texts:
        asked = ("eval", student, "--against", parent, "--json", "--text", text, *sizes)
        done = made.llmsurgeon(*asked, "--device", setting.device.type, here=True)
        if done["code"]:
            found[text.name] = done
            continue
        said = json.loads(done["out"])
        found[text.name] = made.perplexities(said)
    return found
