"""Quality against the share of FFN multiplications that is left, without training.

    python benchmarks/fff_quality.py MODEL --text calibration.txt --unseen other.txt --out curve.json --plot curve.png

The trees are grown once, on the calibration text; each share then takes shapes, rows and a refit of its own.
Encoders are judged by sentence embeddings (mean-pooled, on sentences of the unseen texts): cosine to the parent's, and
rank correlation of the sentence pairs' similarities. Decoders by perplexity on windows of the unseen texts. One more
point shows what a single deep tree of the layer's own neurons does (UltraFastBERT's shape, made without training).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llmsurgeon import recipe, run  # noqa: E402
from llmsurgeon.analysis.calibration import calibration_tokens  # noqa: E402
from llmsurgeon.evaluation.perplexity import token_losses  # noqa: E402
from llmsurgeon.formats.loading import load_model, load_tokenizer  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="calibration text")
    parser.add_argument("--unseen", nargs="+", required=True, help="texts to judge on")
    parser.add_argument("--keep", type=float, nargs="*", default=[0.75, 0.5, 0.25, 0.1])
    parser.add_argument("--depth", type=int, default=4, help="deepest tree to choose from")
    parser.add_argument("--shared-part", type=float, default=0.25)
    parser.add_argument("--deep", type=int, default=10, help="depth of the single tree; 0 leaves it out")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--sequence-length", type=int, default=48)
    parser.add_argument("--sentences", action="store_true", help="encoders: calibrate on sentences, not on windows")
    parser.add_argument("--out", required=True)
    parser.add_argument("--plot")
    arguments = parser.parse_args()
    patient = run.open_patient(arguments.model)
    judge = Sentences(arguments) if patient.family.encoder else Windows(arguments)
    rows = [{"keep": 1.0, **judge(arguments.model)}]
    print(json.dumps(rows[-1]), flush=True)
    steps = [
        f"{{op: fff, keep: {k}, depth: {arguments.depth}, shared_part: {arguments.shared_part}}}"
        for k in arguments.keep
    ]
    if arguments.deep:
        steps.append(f"{{op: fff, form: node, depth: {arguments.deep}, trees: 1}}")
    grown: dict[str, object] = {}
    compute = run.compute_scores

    def once(needed, runner, tokens, recipe_steps, *rest):  # type: ignore[no-untyped-def]
        form = recipe_steps[0].form
        if form not in grown:
            grown[form] = compute(needed, runner, tokens, recipe_steps, *rest)
        return grown[form]

    run.compute_scores = once
    for step, keep in zip(steps, [*arguments.keep, None], strict=False):
        begin = time.monotonic()
        rows.append({"keep": keep, "step": step, **converted(arguments, step, judge)})
        rows[-1]["seconds"] = round(time.monotonic() - begin)
        print(json.dumps(rows[-1]), flush=True)
        Path(arguments.out).write_text(json.dumps(rows, indent=2) + "\n")
    if arguments.plot:
        plot(rows, arguments.plot)


def converted(arguments: argparse.Namespace, step: str, judge) -> dict[str, float]:  # type: ignore[no-untyped-def]
    """Convert with one step and a refit, and judge the result."""
    text = f"""
version: 1
calibration:
  text: {arguments.text}
  tokens: {arguments.tokens}
  sequence_length: {arguments.sequence_length}
  sentences: {str(arguments.sentences).lower()}
steps:
  - {step}
  - {{op: refit, ridge: [0.003, 0.01, 0.03, 0.1]}}
"""
    with tempfile.TemporaryDirectory() as folder:
        outcome = run.run(recipe.loads(text), arguments.model, f"{folder}/out", run.Options())
        planned = outcome.planned
        return {
            "parameters": planned.after.parameters / planned.before.parameters,
            "multiplications": planned.after.flops_per_token / planned.before.flops_per_token,
            **judge(f"{folder}/out"),
        }


class Sentences:
    """Sentence embeddings against the parent's."""

    def __init__(self, arguments: argparse.Namespace, count: int = 500) -> None:
        self.texts = {Path(name).name: sentences(Path(name).read_text(), count) for name in arguments.unseen}
        self.tokenizer = load_tokenizer(arguments.model)
        self.parent: dict[str, torch.Tensor] = {}

    def __call__(self, folder: str) -> dict[str, float]:
        model = load_model(folder, dtype=torch.float32)
        found = {}
        for name, texts in self.texts.items():
            mine = self.embed(model, texts)
            parent = self.parent.setdefault(name, mine)
            pairs = torch.triu_indices(len(mine), len(mine), 1)
            similarities = [(e @ e.T)[pairs[0], pairs[1]] for e in (parent, mine)]
            found[f"{name}: cosine"] = (mine * parent).sum(-1).mean().item()
            found[f"{name}: rank correlation"] = rank_correlation(*similarities)
        return found

    def embed(self, model, texts: list[str]) -> torch.Tensor:  # type: ignore[no-untyped-def]
        """Mean-pooled, normed embeddings."""
        parts = []
        for start in range(0, len(texts), 32):
            batch = self.tokenizer(
                texts[start : start + 32], padding=True, truncation=True, max_length=128, return_tensors="pt"
            )
            with torch.no_grad():
                states = model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None].float()
            parts.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(parts)


class Windows:
    """Perplexity on windows of text."""

    def __init__(self, arguments: argparse.Namespace, tokens: int = 16384) -> None:
        tokenizer = load_tokenizer(arguments.model)
        self.windows = {
            Path(name).name: calibration_tokens(name, tokenizer, text=name, tokens=tokens, sequence_length=256)
            for name in arguments.unseen
        }

    def __call__(self, folder: str) -> dict[str, float]:
        model = load_model(folder)
        found = {}
        for name, windows in self.windows.items():
            with torch.no_grad():
                losses = [token_losses(model(input_ids=row[None]).logits[0, :-1], row[1:]) for row in windows]
            found[f"{name}: perplexity"] = torch.cat([loss.flatten() for loss in losses]).mean().exp().item()
        return found


def sentences(text: str, count: int) -> list[str]:
    """About `count` sentences of a text, spread over it."""
    found = [s.strip() for s in re.split(r"(?<=[.!?])\s+|\n", text)]
    found = [s for s in found if 40 < len(s) < 250 and not s.startswith("=")]
    return found[:: max(1, len(found) // count)][:count]


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's; values are taken to differ."""
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    return torch.corrcoef(ranks)[0, 1].item()


def plot(rows: list[dict], file: str) -> None:  # type: ignore[type-arg]
    """One curve for each measure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measures = [key for key in rows[0] if ": " in key]
    curve = sorted((row for row in rows if row["keep"] is not None), key=lambda row: row["keep"])
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for measure in measures:
        axes.plot([100 * row["keep"] for row in curve], [row[measure] for row in curve], marker="o", label=measure)
    axes.set_xlabel("% of the FFN multiplications left")
    if any("perplexity" in measure for measure in measures):
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
