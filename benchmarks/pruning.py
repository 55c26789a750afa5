"""Perplexity after a quarter of the FFN channels, heads or blocks went: by each way of choosing them, then refitted.

    python benchmarks/pruning.py MODEL --text calibration.txt --unseen other.txt news.txt --out pruning.json

Every row is one recipe: a cut, then `refit` on the calibration text (`--no-refit`: nothing after the cut). Perplexity
ratios are to the parent, with 95 % intervals over windows, on texts that chose and fitted nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llmsurgeon.evaluation.bits_per_byte import scored_by  # noqa: E402
from llmsurgeon.evaluation.perplexity import perplexity, perplexity_interval  # noqa: E402
from llmsurgeon.formats.loading import load_model, load_tokenizer  # noqa: E402
from llmsurgeon.recipe import recipe  # noqa: E402
from llmsurgeon.run import Options, run  # noqa: E402
from llmsurgeon.text.calibration import calibration_sequences  # noqa: E402
from llmsurgeon.text.wanted import Calibration  # noqa: E402

CUTS = {
    "channels, magnitude": "{op: prune_width, keep: KEEP, score: magnitude}",
    "channels, activation": "{op: prune_width, keep: KEEP, score: activation}",
    "channels, least squares": "{op: prune_width, keep: KEEP, score: least_squares}",
    "channels, least squares, spread by loss": "{op: prune_width, keep: KEEP, score: least_squares, spread: loss}",
    "heads, magnitude": "{op: prune_heads, keep: KEEP, unit: head, score: magnitude}",
    "heads, least squares": "{op: prune_heads, keep: KEEP, unit: head, score: least_squares}",
    "blocks, influence": "{op: prune_blocks, count: COUNT, score: influence}",
    "blocks, kl": "{op: prune_blocks, count: COUNT, score: kl}",
    "blocks, rescored": "{op: prune_blocks, count: COUNT, score: rescored}",
    "blocks, window": "{op: prune_blocks, window: COUNT}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="calibration text")
    parser.add_argument("--unseen", nargs="+", required=True, help="texts to judge on")
    parser.add_argument("--share", type=float, default=0.25, help="of channels, heads or blocks that go")
    parser.add_argument("--only", nargs="*", default=list(CUTS), help="rows to run")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--judge-tokens", type=int, default=8192)
    parser.add_argument("--no-refit", action="store_true")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    parent = load_model(arguments.model)
    count = round(arguments.share * parent.config.num_hidden_layers)
    tokenizer = load_tokenizer(arguments.model)
    judging: dict[str, Any] = dict(tokens=arguments.judge_tokens, sequence_length=512)
    texts = {
        Path(t).stem: calibration_sequences(t, tokenizer, Calibration(text=t, **judging)).tokens
        for t in arguments.unseen
    }
    parents = {name: mean_losses(parent, windows) for name, windows in texts.items()}
    del parent
    refit = "" if arguments.no_refit else "  - {op: refit}\n"
    rows: list[dict[str, Any]] = []
    for label in arguments.only:
        cut = CUTS[label].replace("KEEP", str(1 - arguments.share)).replace("COUNT", str(count))
        made = f"{{text: {arguments.text}, self_share: 0, tokens: {arguments.tokens}, sequence_length: 512}}"
        text = f"version: 1\ncalibration: {made}\nsteps:\n  - {cut}\n{refit}"
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            outcome = run(recipe.loads(text), arguments.model, f"{folder}/out", Options())
            row: dict[str, Any] = {"cut": label, "seconds": round(time.monotonic() - began)}
            row["parameters"] = outcome.planned.after.parameters / outcome.planned.before.parameters
            student = load_model(f"{folder}/out")
            for name, windows in texts.items():
                change = mean_losses(student, windows) - parents[name]
                row[name] = [perplexity(change.mean().item()), perplexity_interval(change)]
        rows.append(row)
        print(json.dumps(row), flush=True)
        Path(arguments.out).write_text(json.dumps(rows, indent=2) + "\n")


def mean_losses(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """Mean log loss of each of the windows [S, L], in nats, [S]."""
    return torch.stack([losses.double().mean() for losses in scored_by(model)(windows.tolist())])


if __name__ == "__main__":
    main()
