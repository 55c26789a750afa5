"""A search computed and timed on the card: seconds, what was asked for, what was met.

With --model a real one, for half again its decoding speed in transformers, judged on the texts; else a tiny one.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_parts import made
from gpu_parts.timing import Setting

MINUTES = 2.5


def rows(setting: Setting) -> Iterator[dict[str, Any]]:
    """The search, and what each text says of its model."""
    tiny = setting.model is None
    device = setting.device.type
    with tempfile.TemporaryDirectory(prefix="llmsurgeon-gpu-") as name:
        folder = Path(name)
        parent = made.llama(folder / "parent", 6, tiny=True) if tiny else Path(str(setting.model))
        prose = made.text(folder / "text.txt", 4000)
        target = "params=0.9x" if tiny else "decode=1.5x"
        sizes = ("--tokens", 256, "--refit-tokens", 512, "--seq-len", 16, "--text", prose) if tiny else ()
        asked = ("search", parent, "--target", target, "--engine", "transformers", "--device", device, *sizes)
        ends = ("--minutes", setting.minutes or MINUTES, "-o", folder / "found", "--json")
        found = made.llmsurgeon(*asked, *ends)
        yield {"what": "search", "model": parent.name, "target": target, **made.brief(found), **told(found)}
        run = ("run", folder / "found" / "recipe.yaml", "-o", folder / "made", "--device", device)
        yield {"what": "run", **made.brief(made.llmsurgeon(*run))}
        judging = [Path(text) for text in setting.texts] or [prose]
        few = ("--tokens", 64, "--seq-len", 16) if tiny else ("--tokens", 16384)
        for text in judging:
            asked = ("eval", folder / "made", "--against", parent, "--text", text, *few, "--device", device, "--json")
            judged = made.llmsurgeon(*asked)
            report = json.loads(judged.get("out") or "{}")
            yield {"what": "eval", "text": text.name, **made.brief(judged), **made.perplexities(report)}


def told(found: dict[str, Any]) -> dict[str, Any]:
    """Targets, seconds of each phase, remarks, how many options were scored, and the model that was chosen."""
    report = json.loads(found.get("out") or "{}")
    kept = {key: report[key] for key in ("bounds", "timings", "notes") if key in report}
    chosen = [point for point in report.get("points", ()) if point["chosen"]]
    return kept | {"options": len(report.get("options", ())), "chosen": chosen}
