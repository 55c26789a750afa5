#!/usr/bin/env python3
"""Local and global distillation beside each other, at equal time, from one student.

    python benchmarks/heal.py STUDENT --parent PARENT --text TRAIN.txt --eval WIKI.txt --eval NEWS.txt --minutes 30

Prints one JSON object: for the student as it came and after each mode the perplexity ratio to the parent on each text
of --eval, the tokens a second, and the seconds by what they were spent on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from llmsurgeon.evaluate import SEED
from llmsurgeon.evaluation.decoders import evaluate_decoder
from llmsurgeon.formats.loading import load_model, load_tokenizer
from llmsurgeon.heal import heal
from llmsurgeon.recipe.recipe import load, loads
from llmsurgeon.run import Options
from llmsurgeon.text.calibration import calibration_sequences
from llmsurgeon.text.wanted import Calibration
from llmsurgeon.walk.memory import keep_freed_memory


def quality(student: str, parent: str, texts: list[str], tokens: int, length: int) -> dict[str, Any]:
    """Text -> perplexity ratio with its 95 % interval, and KL, on `tokens` tokens in windows of `length`."""
    tokenizer, models = load_tokenizer(parent), (load_model(student), load_model(parent))
    found = {}
    for text in texts:
        windows = calibration_sequences(
            parent, tokenizer, Calibration(text=text, tokens=tokens, sequence_length=length, seed=SEED)
        ).tokens
        measured = evaluate_decoder(models[0], windows, models[1])
        found[Path(text).name] = {
            "perplexity_ratio": measured.perplexity_ratio,
            "interval": measured.perplexity_ratio_interval,
            "kl": measured.kl,
        }
    return found


def judged_by(arguments: argparse.Namespace) -> tuple[list[str], int, int]:
    """Texts, tokens, window."""
    return arguments.eval, arguments.eval_tokens, arguments.seq_len


def healed(arguments: argparse.Namespace, mode: str, out: Path) -> dict[str, Any]:
    """The same for what `mode` makes of the student in the given time; its speed, and where the time went."""
    changes = [f"distill.mode={mode}", f"distill.minutes={arguments.minutes}", *arguments.set]
    if mode == "local":
        changes.append(f"distill.processes={arguments.processes}")
    plain = "version: 1\nsteps: [{op: distill, top_k: 64, hidden_layers: 6}]\n"
    recipe = load(arguments.recipe, changes) if arguments.recipe else loads(plain, "defaults", changes)
    if arguments.text:
        calibration = recipe.calibration.model_copy(update={"text": arguments.text, "dataset": None, "self_share": 0.0})
        recipe = recipe.model_copy(update={"calibration": calibration})
    options = Options(say=lambda line: print(line, file=sys.stderr, flush=True))
    outcome = heal(arguments.student, arguments.parent, recipe.model_copy(update={"gate": None}), str(out), options)
    assert outcome is not None
    (made,) = outcome.results["distill"].trainings
    phases: dict[str, float] = {}
    for _, training in made.trainings:
        for name, seconds in training.phases.items():
            phases[name] = round(phases.get(name, 0.0) + seconds, 1)
    tokens = sum(training.tokens for _, training in made.trainings)
    return {
        "quality": quality(str(out), arguments.parent, *judged_by(arguments)),
        "seconds": round(made.seconds, 1),
        "tokens": tokens,
        "tokens_per_second": round(tokens / made.seconds, 1),
        "phases": phases,
    }


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("--parent", required=True)
    parser.add_argument("--text", help="what to train on; the parent's own text otherwise")
    parser.add_argument("--eval", action="append", required=True, help="text to measure on; may be repeated")
    parser.add_argument("--eval-tokens", type=int, default=16_384)
    parser.add_argument("--seq-len", type=int, default=512, help="of the windows that are measured on")
    parser.add_argument("--minutes", type=float, default=30.0, help="for each mode")
    parser.add_argument("--modes", nargs="+", default=["global", "local"], choices=["global", "local"])
    parser.add_argument("--processes", type=int, default=torch.get_num_threads(), help="of local mode")
    parser.add_argument("--recipe", help="whose distill step is taken")
    parser.add_argument("--set", action="append", default=[], help="distill.key=value, for both modes")
    arguments = parser.parse_args()
    keep_freed_memory()
    report: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "minutes": arguments.minutes,
        "as it came": quality(arguments.student, arguments.parent, *judged_by(arguments)),
    }
    with tempfile.TemporaryDirectory(prefix="llmsurgeon-heal-") as folder:
        for mode in arguments.modes:
            report[mode] = healed(arguments, mode, Path(folder) / mode)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
