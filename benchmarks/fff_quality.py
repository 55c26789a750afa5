"""Quality against the share of FFN multiplications that is left: after the refit, and after distillation.

    python benchmarks/fff_quality.py MODEL --text calibration.txt --unseen other.txt --out curve.json --plot curve.png
    python benchmarks/fff_quality.py MODEL ... --uniform --distill-minutes 3      # one shape for all layers; two curves

Where layers choose their shapes, trees are grown once, on the calibration text; each share then takes shapes, rows and
a refit of its own. Encoders are judged by sentence embeddings (mean-pooled, on sentences of the unseen texts): cosine
to the parent's, and rank correlation of the sentence pairs' similarities. Decoders by perplexity on windows of the
unseen texts. One more point shows what a single deep tree of the layer's own neurons does (UltraFastBERT's shape, made
without training).
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

from llmsurgeon import run  # noqa: E402
from llmsurgeon.evaluation.perplexity import token_losses  # noqa: E402
from llmsurgeon.formats.loading import load_model, load_tokenizer  # noqa: E402
from llmsurgeon.heal import heal  # noqa: E402
from llmsurgeon.planning.opened import OpenedCheckpoint, open_model  # noqa: E402
from llmsurgeon.recipe import recipe  # noqa: E402
from llmsurgeon.text.calibration import calibration_sequences  # noqa: E402
from llmsurgeon.text.files import file_text  # noqa: E402
from llmsurgeon.text.wanted import Calibration  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="calibration text")
    parser.add_argument("--unseen", nargs="+", required=True, help="texts to judge on")
    parser.add_argument("--keep", type=float, nargs="*", default=[0.75, 0.5, 0.25, 0.1])
    parser.add_argument("--depth", type=int, default=4, help="deepest tree to choose from")
    parser.add_argument("--uniform", action="store_true", help="one shape of --depth for all layers, by counting")
    parser.add_argument("--shared-part", type=float, default=0.25)
    parser.add_argument("--deep", type=int, default=10, help="depth of the single tree; 0 leaves it out")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--sequence-length", type=int, default=48)
    parser.add_argument("--sentences", action="store_true", help="encoders: calibrate on sentences, not on windows")
    parser.add_argument("--judge-tokens", type=int, default=16384, help="decoders: tokens of each unseen text")
    parser.add_argument("--distill-minutes", type=float, help="distil each share for so long, too")
    parser.add_argument("--set", dest="sets", action="append", default=[], help="of the distillation: batch=16 ...")
    parser.add_argument("--out", required=True)
    parser.add_argument("--plot")
    arguments = parser.parse_args()
    parent = open_model(arguments.model)
    judge = Sentences(arguments) if parent.family.encoder else Windows(arguments, arguments.judge_tokens)
    rows = [{"keep": 1.0, "how": "parent", **judge(arguments.model)}]
    print(json.dumps(rows[-1]), flush=True)
    steps = [step_of(arguments, parent, keep) for keep in arguments.keep]
    if arguments.deep:
        steps.append(f"{{op: fff, form: node, depth: {arguments.deep}, trees: 1}}")
    grow_once()
    for step, keep in zip(steps, [*arguments.keep, None], strict=False):
        for row in converted(arguments, step, judge, distil=bool(keep and arguments.distill_minutes)):
            rows.append({"keep": keep, "step": step, **row})
            print(json.dumps(rows[-1]), flush=True)
            Path(arguments.out).write_text(json.dumps(rows, indent=2) + "\n")
    if arguments.plot:
        plot(rows, arguments.plot)


def step_of(arguments: argparse.Namespace, parent: OpenedCheckpoint, keep: float) -> str:
    """The step that leaves this share of the FFN multiplications."""
    if not arguments.uniform:
        return f"{{op: fff, keep: {keep}, depth: {arguments.depth}, shared_part: {arguments.shared_part}}}"
    ffn = parent.spec.layers[0].ffn
    assert ffn
    rows = 3 if len(parent.family.ffn_in) * parent.family.ffn_stacked == 2 else 2
    neurons = int(keep * ffn.width - arguments.depth / rows)
    shared = int(neurons * arguments.shared_part)
    return f"{{op: fff, depth: {arguments.depth}, leaf_width: {neurons - shared}, shared: {shared}}}"


def grow_once() -> None:
    """Steps that choose their shapes from the same trees share them."""
    grown: dict[str, object] = {}
    compute = run.compute_scores

    def once(recipe_steps, *rest):  # type: ignore[no-untyped-def]
        step = recipe_steps[0]
        key = step.form if step.keep else str(step)
        if key not in grown:
            grown[key] = compute(recipe_steps, *rest)
        return grown[key]

    run.compute_scores = once


def converted(arguments: argparse.Namespace, step: str, judge, distil: bool):  # type: ignore[no-untyped-def]
    """Convert with one step and a refit, and judge the result; then distil that, and judge again."""
    begin = time.monotonic()
    head = f"""
version: 1
calibration:
  text: {arguments.text}
  self_share: 0
  tokens: {arguments.tokens}
  sequence_length: {arguments.sequence_length}
  sentences: {str(arguments.sentences).lower()}
steps:
"""
    fit = f"  - {step}\n  - {{op: refit, ridge: [0.003, 0.01, 0.03, 0.1]}}\n"
    with tempfile.TemporaryDirectory() as folder:
        outcome = run.run(recipe.loads(head + fit), arguments.model, f"{folder}/refit", run.Options())
        planned = outcome.planned
        costs = {
            "parameters": planned.after.parameters / planned.before.parameters,
            "multiplications": planned.after.flops_per_token / planned.before.flops_per_token,
        }
        seconds = round(time.monotonic() - begin)
        yield {"how": "refit", **costs, **judge(f"{folder}/refit"), "seconds": seconds}
        if not distil:
            return
        sets = [f"distill.{each}" for each in (f"minutes={arguments.distill_minutes}", *arguments.sets)]
        training = recipe.loads(head + "  - {op: distill}\n", overrides=sets)
        healed = heal(f"{folder}/refit", arguments.model, training, f"{folder}/healed", run.Options())
        assert healed is not None
        (made,) = healed.trainings
        trained = {"tokens trained on": made.tokens, "seconds": round(made.seconds)}
        yield {"how": "distilled", **costs, **judge(f"{folder}/healed"), **trained}


class Sentences:
    """Sentence embeddings against the parent's."""

    def __init__(self, arguments: argparse.Namespace, count: int = 500) -> None:
        self.texts = {Path(name).name: sentences(file_text(name), count) for name in arguments.unseen}
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
            Path(name).name: calibration_sequences(
                name, tokenizer, Calibration(text=name, tokens=tokens, sequence_length=256)
            ).tokens
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
    """One curve for each measure, with the refit alone and, dashed, after distillation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measures = [key for key in rows[0] if ": " in key]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for place, measure in enumerate(measures):
        for how, line in (("refit", "-"), ("distilled", "--")):
            curve = [row for row in rows if row["keep"] is not None and row["how"] in ("parent", how)]
            curve.sort(key=lambda row: row["keep"])
            if len(curve) > 1:
                shares, values = [100 * row["keep"] for row in curve], [row[measure] for row in curve]
                axes.plot(shares, values, line, marker="o", color=f"C{place}", label=f"{measure}, {how}")
    axes.set_xlabel("% of the FFN multiplications left")
    if any("perplexity" in measure for measure in measures):
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    main()
