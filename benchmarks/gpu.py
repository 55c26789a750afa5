"""The four papers' headline figures on one GPU, part by part: each in a process of its own, each under two minutes.

    python benchmarks/gpu.py --part ternary --part fff --out results     # some parts
    python benchmarks/gpu.py --quick --out results                       # all of them, fewer sizes
    python benchmarks/gpu.py --dry-run --out results                     # every line on a CPU, tiny shapes, no figures

OUT/PART.jsonl grows row by row, so a part that is killed keeps what it measured; OUT/PART.json is written at its end,
with the machine, the command and what went wrong, if anything did. Decoding is timed in CUDA graphs, after a warm-up,
several inputs in turn; figures are medians with quartiles, of CUDA events. A part that fails spoils no other.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
# Part -> its module in gpu_parts, whose `rows(setting)` gives figures; in order of what they are worth.
PARTS = {
    "ternary": "ternary",
    "tiles": "tiles",
    "fusion": "fusion",
    "fff": "fff",
    "matmulfree": "matmulfree",
    "block": "block",
    "heal": "heal",
    "analyze": "analyze",
    "convert": "convert",
    "search": "search",
}
SECONDS = 120


def main() -> None:
    """Each part that is asked for, and one line about each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=list(PARTS), help="may be repeated; default: all")
    parser.add_argument("--out", default=os.environ.get("OUT", "gpu-results"), help="folder of the results")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each part, which is then killed")
    parser.add_argument("--quick", action="store_true", help="fewer sizes")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU: that every line runs")
    parser.add_argument("--model", help="heal: the parent, as SmolLM2-135M-Instruct; without it a tiny one")
    parser.add_argument("--text", action="append", default=[], help="heal: a text that judges; may be repeated")
    parser.add_argument("--minutes", type=float, help="heal: of training, each student")
    parser.add_argument("--together", action="store_true", help="heal: all students at once on the card")
    parser.add_argument("--here", action="store_true", help="in this process, which loads torch once")
    arguments = parser.parse_args()
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    if arguments.here:
        failed = [part for part in arguments.part or PARTS if not measure(part, arguments, out)]
        sys.exit(1 if failed else 0)
    for part in arguments.part or PARTS:
        print(json.dumps(run(part, arguments, out)), flush=True)


def run(part: str, arguments: argparse.Namespace, out: Path) -> dict[str, Any]:
    """One part in a process of its own; how it ended, in a few words."""
    command = [sys.executable, __file__, "--here", "--part", part, "--out", str(out)]
    command += [flag for flag, on in (("--quick", arguments.quick), ("--dry-run", arguments.dry_run)) if on]
    command += ["--model", arguments.model] if arguments.model else []
    command += ["--minutes", str(arguments.minutes)] if arguments.minutes else []
    command += ["--together"] if arguments.together else []
    command += [word for text in arguments.text for word in ("--text", text)]
    for old in (out / f"{part}.json", out / f"{part}.jsonl"):
        old.unlink(missing_ok=True)
    start, code = time.monotonic(), 0
    with open(out / f"{part}.log", "w") as log:
        try:
            code = subprocess.run(command, stdout=log, stderr=log, timeout=arguments.seconds, check=False).returncode
        except subprocess.TimeoutExpired:
            code = 124
    rows = (out / f"{part}.jsonl").read_text().splitlines() if (out / f"{part}.jsonl").exists() else []
    return {"part": part, "code": code, "rows": len(rows), "seconds": round(time.monotonic() - start, 1)}


def measure(part: str, arguments: argparse.Namespace, out: Path) -> bool:
    """The rows of a part as they come, and all of it at the end; False where it failed."""
    from gpu_parts.timing import Setting

    setting = Setting(
        *(arguments.dry_run, arguments.quick, arguments.model, tuple(arguments.text)),
        *(arguments.minutes, arguments.together),
    )
    rows: list[dict[str, Any]] = []
    failure, start = None, time.monotonic()
    try:
        for row in importlib.import_module(f"gpu_parts.{PARTS[part]}").rows(setting):
            rows.append(row)
            with open(out / f"{part}.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
    except Exception:
        failure = traceback.format_exc()
        print(failure, flush=True)
    made = {
        "part": part,
        "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        "dry_run": arguments.dry_run,
        "seconds": round(time.monotonic() - start, 1),
        "machine": machine(),
        "failure": failure,
        "rows": rows,
    }
    (out / f"{part}.json").write_text(json.dumps(made, indent=1) + "\n")
    return failure is None


def machine() -> dict[str, Any]:
    """Card, driver and versions."""
    import torch

    found: dict[str, Any] = {
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }
    for name in ("torch", "transformers", "triton", "accelerate"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found |= {"card": card.name, "memory": card.total_memory, "processors": card.multi_processor_count}
        found["cuda"] = torch.version.cuda
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            found["driver"] = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
        except OSError:
            found["driver"] = None
    return found


if __name__ == "__main__":
    main()
