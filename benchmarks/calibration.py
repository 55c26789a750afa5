"""What calibration on one text, on what the model writes, and on both keeps of each kind of text.

    python benchmarks/calibration.py MODEL --recipe steps.yaml --text wiki.txt --judge wiki-last.txt code.txt maths.txt

Every row is the recipe with another calibration: its steps are the same. Perplexity ratios are to the parent, with 95 %
intervals over windows, on texts that neither chose nor fitted anything.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from llmsurgeon.evaluation.decoders import evaluate_decoder
from llmsurgeon.formats.loading import load_model, load_tokenizer
from llmsurgeon.recipe.recipe import TextSource, load
from llmsurgeon.run import Options, run
from llmsurgeon.text.calibration import calibration_sequences
from llmsurgeon.text.wanted import Calibration

# What is calibrated on -> the recipe's `calibration` but for tokens and lengths, from the text that is named.
WAYS = {
    "text": lambda text: {"text": text, "self_share": 0.0},
    "openers": lambda text: {"texts": tuple(TextSource(self=kind) for kind in ("prose", "encyclopaedia", "news"))},
    "kinds": lambda text: {},
    "quarter": lambda text: {"text": text, "self_share": 0.25},
    "half": lambda text: {"text": text, "self_share": 0.5},
}


def main() -> None:
    """Print a row for each way and text, and write them to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--recipe", required=True, help="what is done to the model; its calibration is replaced")
    parser.add_argument("--text", required=True, help="the text of one kind")
    parser.add_argument("--judge", nargs="+", required=True, help="texts of every kind")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--tokens", type=int, default=16384, help="of calibration")
    parser.add_argument("--judge-tokens", type=int, default=4096, help="of each text that judges")
    parser.add_argument("--threads", type=int, help="default: torch's own number")
    parser.add_argument("--out", help="JSON file")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows = [row for way in arguments.ways for row in judged(arguments, way)]
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(rows, indent=1) + "\n")


def judged(arguments: argparse.Namespace, way: str) -> list[dict[str, Any]]:
    """The recipe calibrated in one way: a row for each text that judges."""
    recipe, sizes = load(arguments.recipe), {"tokens": arguments.tokens, "sequence_length": 256}
    calibration = type(recipe.calibration)(**sizes, **WAYS[way](arguments.text))
    recipe = recipe.model_copy(update={"calibration": calibration, "gate": None})
    tokenizer, rows = load_tokenizer(arguments.model), []
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        run(recipe, arguments.model, f"{folder}/out", Options())
        seconds = round(time.monotonic() - began)
        student, parent = load_model(f"{folder}/out"), load_model(arguments.model)
        for text in arguments.judge:
            wanted = Calibration(text=text, tokens=arguments.judge_tokens, sequence_length=256)
            windows = calibration_sequences(text, tokenizer, wanted).tokens
            found = evaluate_decoder(student, windows, parent)
            low, high = found.perplexity_ratio_interval or (float("nan"),) * 2
            print(f"{way}\t{Path(text).stem}\t{found.perplexity_ratio:.3f} ({low:.3f} to {high:.3f})", flush=True)
            rows.append({"way": way, "seconds": seconds, "text": Path(text).stem, **found.to_dict()})
    return rows


if __name__ == "__main__":
    main()
