"""What a state of one size is worth, and what the fused BitLinear saves.

    python benchmarks/matmulfree.py context MODEL --out context.json --plot context.png
    python benchmarks/matmulfree.py linear --tokens 2048 --out linear.json
    python benchmarks/matmulfree.py quality MODEL --text calibration.txt --unseen other.txt --out quality.json

context: MODEL against itself with an MLGRU for every attention (mixers as they are made, no healing: what is timed does
not depend on values). At each context the caches are filled with random keys, values and states of that length, so that
no prompt has to be read; what is measured is the bytes they hold and the time of a token, models in turn, medians.
`--prefill` also times reading a prompt, at the lengths that it names.

linear: a BitLinear with its forward and backward pass as one autograd function against the same step by step: bytes
that the backward pass waits for, beyond weights and input, and time of a training step, in turn, medians.

quality: perplexity on unseen texts with MLGRUs in place of the attentions that cost least, before and after the
closed-form alignment (`refit`).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fff_quality import Windows  # noqa: E402

from llmsurgeon import run  # noqa: E402
from llmsurgeon.analysis import scores  # noqa: E402
from llmsurgeon.checkpoint.transform import TransformedWeights  # noqa: E402
from llmsurgeon.evaluation.latency import cache_bytes, state_bytes  # noqa: E402
from llmsurgeon.formats.caches import cached_call  # noqa: E402
from llmsurgeon.formats.models import empty_model, fill  # noqa: E402
from llmsurgeon.formats.write import write_config  # noqa: E402
from llmsurgeon.modeling.surgeon_mlgru import BitLinear, MLGRUState  # noqa: E402
from llmsurgeon.operations.matmulfree import MatMulFree  # noqa: E402
from llmsurgeon.planning.opened import open_model  # noqa: E402
from llmsurgeon.recipe import recipe  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    context = commands.add_parser("context")
    context.add_argument("model")
    context.add_argument("--contexts", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384])
    context.add_argument("--prefill", type=int, nargs="*", default=[])
    context.add_argument("--plot")
    context.set_defaults(run=contexts)
    linear = commands.add_parser("linear")
    linear.add_argument("--tokens", type=int, default=2048)
    linear.add_argument("--shapes", nargs="+", default=["576x576", "576x1536", "1536x576"])
    linear.set_defaults(run=linears)
    quality = commands.add_parser("quality")
    quality.add_argument("model")
    quality.add_argument("--text", required=True, help="calibration text")
    quality.add_argument("--unseen", nargs="+", required=True, help="texts to judge on")
    quality.add_argument("--counts", type=int, nargs="+", default=[1, 3, 5])
    quality.add_argument("--tokens", type=int, default=8192, help="of calibration")
    quality.add_argument("--score-tokens", type=int, default=2048, help="of these, what attentions are chosen by")
    quality.add_argument("--judge-tokens", type=int, default=4096, help="of each unseen text")
    quality.set_defaults(run=qualities)
    for command in (context, linear, quality):
        command.add_argument("--repeats", type=int, default=7)
        command.add_argument("--threads", type=int, default=torch.get_num_threads())
        command.add_argument("--dtype", default="float32")
        command.add_argument("--out", required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for row in arguments.run(arguments):
        rows.append(row)
        print(json.dumps(row), flush=True)
        Path(arguments.out).write_text(json.dumps(rows, indent=2) + "\n")
    if getattr(arguments, "plot", None):
        plot(rows, arguments.plot)


def contexts(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each context."""
    dtype = getattr(torch, arguments.dtype)
    steps: dict[str, tuple[Any, ...]] = {"attention": (), "mlgru": (MatMulFree(),)}
    models = {name: built(arguments.model, dtype, made) for name, made in steps.items()}
    for length in sorted({*arguments.contexts, *arguments.prefill}):
        row: dict[str, Any] = {"context": length}
        caches = {name: filled_cache(model, length, dtype) for name, model in models.items()}
        for name, cache in caches.items():
            row[f"{name} cache bytes"] = cache_bytes(cache) + state_bytes(cache)
        row |= {f"{name} ms a token": value for name, value in timed(models, caches, length, arguments.repeats).items()}
        if length in arguments.prefill:
            row |= {f"{name} prefill s": value for name, value in prefilled(models, length).items()}
        yield row


def built(name: str, dtype: torch.dtype, steps: tuple[Any, ...]) -> Any:
    """The model in the surgeon format in memory after these steps."""
    parent = open_model(name)
    subject, weights = parent.subject({}), parent.weights
    for step in steps:
        plan = step.resolve(subject).plan(subject)
        weights, subject = TransformedWeights(weights, plan.transforms), subject.after(plan)
    written = write_config(subject.spec, parent.family, parent.config, "surgeon")
    model = empty_model(written.config)
    fill(model, weights, dtype, "cpu")
    return model.eval()


def filled_cache(model: Any, length: int, dtype: torch.dtype) -> Any:
    """A cache in which so many tokens have been."""
    from transformers import DynamicCache

    cache, config = DynamicCache(config=model.config), model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for layer in cache.layers:
        if isinstance(layer, MLGRUState):
            layer.advance(torch.randn(1, config.num_attention_heads * width), length)
        else:
            keys = torch.randn(1, config.num_key_value_heads, length, width, dtype=dtype)
            layer.update(keys, keys.clone())
    return cache


@torch.inference_mode()
def timed(models: dict[str, Any], caches: dict[str, Any], length: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of a decode step, models in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(repeats + 2):
        for name, model in models.items():
            position = torch.tensor([[length + turn]])
            start = time.perf_counter()
            cached_call(model, caches[name], input_ids=torch.tensor([[5]]), position_ids=position)
            seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * median(values[2:]) for name, values in seconds.items()}


@torch.inference_mode()
def prefilled(models: dict[str, Any], length: int) -> dict[str, float]:
    """Seconds that reading a prompt takes, once, after a short one."""
    found = {}
    for name, model in models.items():
        tokens = torch.randint(0, model.config.vocab_size, (1, length))
        model(input_ids=tokens[:, :64], use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        model(input_ids=tokens, use_cache=True, logits_to_keep=1)
        found[name] = time.perf_counter() - start
    return found


def linears(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each shape."""
    dtype = getattr(torch, arguments.dtype)
    for shape in arguments.shapes:
        inputs, outputs = (int(side) for side in shape.split("x"))
        layer = BitLinear(inputs, outputs, False, 1e-6).to(dtype).train()
        x = torch.randn(arguments.tokens, inputs, dtype=dtype, requires_grad=True)
        upstream = torch.randn(arguments.tokens, outputs, dtype=dtype)
        seconds: dict[str, list[float]] = {"fused": [], "unfused": []}
        row: dict[str, Any] = {"shape": shape, "tokens": arguments.tokens}
        for turn in range(arguments.repeats + 1):
            for name in seconds:
                layer.fused = name == "fused"
                start = time.perf_counter()
                layer(x).backward(upstream)
                if turn:
                    seconds[name].append(1000 * (time.perf_counter() - start))
                layer.zero_grad()
        for name in seconds:
            layer.fused = name == "fused"
            row |= {f"{name} saved bytes": saved_bytes(layer, x), f"{name} ms": median(seconds[name])}
        yield row


def saved_bytes(layer: BitLinear, x: torch.Tensor) -> int:
    """Bytes that the backward pass waits for, without weights and the input, which are there anyway."""
    found: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = layer(x)
    own = {tensor.untyped_storage().data_ptr() for tensor in (x, output, *layer.parameters())}
    return sum(size for pointer, size in found.items() if pointer not in own)


def qualities(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The parent, then each number of MLGRUs without and with the fit."""
    judge = Windows(arguments, arguments.judge_tokens)
    yield {"mlgrus": 0, **judge(arguments.model)}
    few = replace(scores.MEASURED, tokens=arguments.score_tokens)
    scores.SCORES |= {name: few for name, score in scores.SCORES.items() if score is scores.MEASURED}
    compute, known = run.compute_scores, {}

    def once(*given):  # type: ignore[no-untyped-def]
        if not known:
            known.update(compute(*given))
        return known

    run.compute_scores = once
    for count in arguments.counts:
        for heals in ("", "  - {op: refit}\n"):
            text = f"""
version: 1
calibration: {{text: {arguments.text}, self_share: 0, tokens: {arguments.tokens}, sequence_length: 512}}
steps:
  - {{op: matmulfree, count: {count}}}
{heals}"""
            with tempfile.TemporaryDirectory() as folder:
                made = run.run(recipe.loads(text), arguments.model, f"{folder}/out", run.Options()).planned
                layers = made.recipe.steps[0].layers
                kv = made.after.kv_bytes_per_token / made.before.kv_bytes_per_token
                yield {"mlgrus": count, "layers": layers, "refit": bool(heals), "kv": kv, **judge(f"{folder}/out")}


def plot(rows: list[dict[str, Any]], file: str) -> None:
    """Memory and time of a token against the context, both models."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, sides = pyplot.subplots(1, 2, figsize=(9, 3.6))
    lengths = [row["context"] for row in rows]
    for axes, what, scale, label in (
        (sides[0], "cache bytes", 1e6, "cache, MB"),
        (sides[1], "ms a token", 1.0, "a token, ms"),
    ):
        for name in ("attention", "mlgru"):
            axes.plot(lengths, [row[f"{name} {what}"] / scale for row in rows], marker="o", label=name)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens of context")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
