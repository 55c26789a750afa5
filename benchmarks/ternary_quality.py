"""Perplexity and size against the share of block linears that are ternary, by rounding and with codes that compensate.

    python benchmarks/ternary_quality.py MODEL --text calibration.txt --unseen other.txt --out curve.json

Which linears go first is measured once (the step's `share`). Sizes are of the safetensors with ternary linears packed
(format bitnet, where there is one scale for each tensor), and of the GGUF file where --gguf asks for it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llmsurgeon import run  # noqa: E402
from llmsurgeon.evaluation.perplexity import token_losses  # noqa: E402
from llmsurgeon.export import export_gguf  # noqa: E402
from llmsurgeon.formats.bitnet import packing_of, ternary_linears  # noqa: E402
from llmsurgeon.formats.loading import load_model, load_tokenizer  # noqa: E402
from llmsurgeon.formats.models import empty_model  # noqa: E402
from llmsurgeon.planning.opened import open_model  # noqa: E402
from llmsurgeon.recipe import recipe  # noqa: E402
from llmsurgeon.text.calibration import calibration_sequences  # noqa: E402
from llmsurgeon.text.wanted import Calibration  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="calibration text")
    parser.add_argument("--unseen", nargs="+", required=True, help="texts to judge on")
    parser.add_argument("--share", type=float, nargs="*", default=[0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--method", nargs="*", default=["round", "compensated"])
    parser.add_argument("--step", default="", help="further keys of the step, e.g. 'granularity: row'")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--judge-tokens", type=int, default=4096)
    parser.add_argument("--gguf", help="TQ2_0 or TQ1_0: also give the size of that file")
    parser.add_argument("--keep", help="folder for the models that are made; else they are removed once judged")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    judge = judges(arguments)
    rows = [{"share": 0.0, **judge(arguments.model)}]
    print(json.dumps(rows[-1]), flush=True)
    measured: dict[str, object] = {}
    compute = run.compute_scores

    def once(*asked):  # type: ignore[no-untyped-def]
        measured.update(measured or compute(*asked))
        return measured

    run.compute_scores = once
    for share in arguments.share:
        for method in arguments.method:
            rows.append({"share": share, "method": method, **converted(arguments, share, method, judge)})
            print(json.dumps(rows[-1]), flush=True)
            Path(arguments.out).write_text(json.dumps(rows, indent=2) + "\n")


def converted(arguments: argparse.Namespace, share: float, method: str, judge) -> dict[str, float]:  # type: ignore[no-untyped-def]
    """Make one model and judge it."""
    more = f", {arguments.step}" if arguments.step else ""
    # All of them need no order, so nothing is measured first.
    which = f"share: {share}, " if share < 1 else ""
    text = f"""
version: 1
calibration: {{text: {arguments.text}, self_share: 0, tokens: {arguments.tokens}, sequence_length: 256}}
steps:
  - {{op: ternary, {which}method: {method}{more}}}
"""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{arguments.keep or folder}/{method}-{share}"
        began = time.monotonic()
        run.run(recipe.loads(text), arguments.model, out, run.Options(dtype=torch.float32))
        seconds = time.monotonic() - began
        found = {"seconds": round(seconds, 1), **judge(out)}
        if "granularity" not in arguments.step:
            parent = open_model(out)
            meta = parent.meta()
            empty = empty_model(parent.config)
            packing = packing_of(empty, meta, ternary_linears(parent.weights, empty))
            plain = sum(t.numel() * t.dtype.itemsize for t in meta.values())
            found |= {"plain_bytes": plain, "packed_bytes": plain - packing.saved(meta)}
        if arguments.gguf:
            made = export_gguf(out, f"{folder}/out.gguf", type=arguments.gguf, float_type="BF16")
            found["gguf_bytes"] = made.size
        return found


def judges(arguments: argparse.Namespace):  # type: ignore[no-untyped-def]
    """folder -> perplexity on windows of each unseen text."""
    tokenizer = load_tokenizer(arguments.model)
    texts = {
        Path(name).name: calibration_sequences(
            name, tokenizer, Calibration(text=name, tokens=arguments.judge_tokens, sequence_length=256)
        ).tokens
        for name in arguments.unseen
    }

    def judge(folder: str) -> dict[str, float]:
        model = load_model(folder, dtype=torch.float32)
        found = {}
        with torch.no_grad():
            for name, windows in texts.items():
                losses = [token_losses(model(input_ids=row[None]).logits[0, :-1], row[1:]) for row in windows]
                found[f"{name}: perplexity"] = torch.cat([loss.flatten() for loss in losses]).mean().exp().item()
        return found

    return judge


if __name__ == "__main__":
    main()
