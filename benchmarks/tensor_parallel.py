"""What tensor parallelism has of FFN fusion: all-reduces and bytes a token, decode time, and a model of it.

    python benchmarks/tensor_parallel.py --work FOLDER --ranks 2 --ranks 4    # on this machine, over gloo
    python benchmarks/tensor_parallel.py --work FOLDER --count                # counts alone: need no idle machine
    python benchmarks/tensor_parallel.py --predict                            # Ultra-253B's shape on 8 GPUs

A Llama of random weights, of it one without the attentions of ten layers in its second half, and of that one with its
attention-free FFNs fused in two runs, as Ultra-253B is made (FFN Fusion, arXiv 2503.18908). Each rank holds a share of
every attention and FFN; behind each stands one all-reduce of the hidden state. Every collective of a decode step is
counted as it is dispatched. Steps are timed in turn, also with all-reduces that do nothing: what that saves is held
against reductions * (alpha + bytes / beta), alpha and beta from all-reduces timed by themselves. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
}
DROP = "{op: prune_attention, layers: 13-22}"
FUSE = "{op: fuse_ffn, runs: [13-17, 18-22]}"
VARIANTS = {"dropped": [DROP], "fused": [DROP, FUSE]}
STEPS, ROUNDS, PROMPT = 4, 5, 16
# Of all-reduces timed by themselves: numbers of bfloat16.
SIZES = (512, 1024, 4096, 16384, 65536, 262144)


class Collectives(TorchDispatchMode):
    """Counts what is dispatched between ranks, and its bytes: of one rank, as handed over."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func.name().partition("::")
        kind = name.partition(".")[0].rstrip("_").replace("allreduce", "all_reduce")
        if space in ("c10d", "_c10d_functional") and not kind.startswith("wait"):
            tensors = args[0] if isinstance(args[0], list) else [args[0]]
            self.calls[kind] += 1
            self.bytes[kind] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return func(*args, **(kwargs or {}))


def make(work: Path) -> dict[str, Path]:
    """name -> checkpoint of the three models in `work`; those that are there stay."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmsurgeon.recipe.recipe import loads
    from llmsurgeon.run import run

    parent = work / "parent"
    if not parent.exists():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16).save_pretrained(parent)
    for name, steps in VARIANTS.items():
        if not (work / name).exists():
            run(loads("version: 1\nsteps:\n" + "".join(f"  - {step}\n" for step in steps)), parent, work / name)
    return {name: work / name for name in ("parent", *VARIANTS)}


def decode(model: Any, cache: Any, token: torch.Tensor) -> Any:
    """One step: (the next token, the cache behind it)."""
    from llmsurgeon.formats.caches import cached_call

    out, cache = cached_call(model, cache, input_ids=token)
    return out.logits[:, -1:].argmax(-1), cache


def timed(model: Any, reduce: Any) -> list[float]:
    """Seconds of each of STEPS decode steps behind a prompt, all-reduces done by `reduce`."""
    token, cache = decode(model, None, torch.arange(3, 3 + PROMPT)[None])
    token, cache = decode(model, cache, token)
    kept, dist.all_reduce = dist.all_reduce, reduce
    seconds = []
    for _ in range(STEPS):
        dist.barrier()
        began = time.perf_counter()
        token, cache = decode(model, cache, token)
        seconds.append(time.perf_counter() - began)
    dist.all_reduce = kept
    return seconds


def line(sizes: list[float], seconds: list[float]) -> tuple[float, float]:
    """alpha, beta of the least squares of relative errors of seconds = alpha + bytes / beta."""
    weight = 1 / torch.tensor(seconds, dtype=torch.float64)
    rows = torch.stack([weight, torch.tensor(sizes, dtype=torch.float64) * weight], 1)
    alpha, slope = torch.linalg.lstsq(rows, torch.ones(len(sizes), 1, dtype=torch.float64)).solution.flatten().tolist()
    return alpha, 1 / slope


def reduction() -> dict[str, float]:
    """alpha in seconds and beta in bytes a second of an all-reduce among these ranks."""
    found = []
    for numbers in SIZES:
        tensor, seconds = torch.ones(numbers, dtype=torch.bfloat16), []
        for _ in range(40):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(tensor)
            seconds.append(time.perf_counter() - began)
        found.append(median(seconds[5:]))
    alpha, beta = line([2.0 * numbers for numbers in SIZES], found)
    return {"alpha": alpha, "beta": beta}


@torch.no_grad()
def rank(work: Path, count: bool, out: Path) -> None:
    """What one rank does, under torchrun; the first one writes down what it found."""
    import transformers
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    dist.init_process_group("gloo")
    models, found = {}, {name: {} for name in ("parent", *VARIANTS)}
    for name in found:
        models[name] = AutoModelForCausalLM.from_pretrained(
            work / name, trust_remote_code=True, distributed_config=DistributedConfig(tp_plan="auto")
        )
        token, cache = decode(models[name], None, torch.arange(3, 3 + PROMPT)[None])
        with Collectives() as seen:
            decode(models[name], cache, token)
        found[name] = {"calls": dict(seen.calls), "bytes": dict(seen.bytes), "seconds": [], "silent": []}
    rounds = 0 if count else ROUNDS
    for _ in range(rounds):
        for name, model in models.items():
            found[name]["seconds"] += timed(model, dist.all_reduce)
            found[name]["silent"] += timed(model, lambda *_, **__: None)
    if not count:
        found["reduction"] = reduction()
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))
    dist.destroy_process_group()


def measure(work: Path, ranks: int, count: bool) -> dict[str, Any]:
    """What `ranks` processes of this machine found."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        arguments = ["--work", str(work), "--out", str(out), *(["--count"] if count else [])]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        subprocess.run([sys.executable, *torchrun, __file__, *arguments], env=environment, check=True)
        return json.loads(out.read_text())


def table(found: dict[str, Any], ranks: int) -> str:
    """Rows of the three models on these ranks."""
    counted = f"| {ranks} ranks | all-reduces a token | bytes all-reduced | bytes gathered |"
    timing = " decode, ms | without all-reduces, ms | between | alpha + bytes / beta | against the parent |"
    times = "reduction" in found
    lines = [counted + (timing if times else ""), "|---|---|---|---|" + ("---|---|---|---|---|" if times else "")]
    for name in ("parent", *VARIANTS):
        at = found[name]
        row = f"| {name} | {at['calls']['all_reduce']} | {at['bytes']['all_reduce']:,} | "
        row += f"{sum(at['bytes'].values()) - at['bytes']['all_reduce']:,} |"
        if times:
            whole, silent = (median(at[key]) for key in ("seconds", "silent"))
            # The embedding's is not among those that `timed` silences.
            calls, size = at["calls"]["all_reduce"] - 1, 2 * SHAPE["hidden_size"]
            said = calls * (found["reduction"]["alpha"] + size / found["reduction"]["beta"])
            row += f" {whole * 1e3:.1f} | {silent * 1e3:.1f} | {(whole - silent) * 1e3:.1f} | {said * 1e3:.1f} |"
            row += f" {median(found['parent']['seconds']) / whole:.2f}x |"
        lines.append(row)
    if times:
        alpha, beta = found["reduction"]["alpha"], found["reduction"]["beta"]
        lines.append(f"\nalpha {alpha * 1e6:.0f} microseconds, beta {beta / 1e9:.2f} GB/s.")
    return "\n".join(lines)


@dataclass(frozen=True)
class Machine:
    """What decides a decode step: bytes a second that all GPUs read together, and the cost of a reduction."""

    bandwidth: float
    alpha: float
    beta: float

    def step(self, weights: float, reductions: int, size: float) -> float:
        """Seconds a token: weights are read once, hidden states of `size` bytes summed over the ranks."""
        return weights / self.bandwidth + reductions * (self.alpha + size / self.beta)


# One node of eight H100: 3.35 TB/s each (NVIDIA's data sheet), and NVLink's 450 GB/s each way, of which a ring moves a
# byte 2 * 7 / 8 times. The weights at 8 bits: at 16, 405 billion do not fit in 640 GB. What they reach is open.
EIGHT = {"bandwidth": 8 * 3.35e12, "beta": 450e9 / 1.75}
REACHED = (1.0, 0.8, 0.65)
ALPHAS = (10e-6, 20e-6, 40e-6)
# arXiv 2503.18908, tokens a second: Llama-3.1-405B-Instruct, pruned, and fused.
PAPER = {"parent": 41.4, "pruned": 63.4, "fused": 70.9}


def ultra() -> dict[str, tuple[float, int]]:
    """model -> (weights, all-reduces a token) of Llama-3.1-405B and of what the recipe `ultra` makes of it.

    The recipe narrows no FFN: of Ultra-253B the number of weights is its own.
    """
    from llmsurgeon.recipe.recipe import load, loads
    from llmsurgeon.run import preview

    shape = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16384, "vocab_size": 128256}
    shape |= {"intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128}
    shape |= {"num_key_value_heads": 8, "tie_word_embeddings": False, "dtype": "bfloat16"}
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(shape))
        fused = preview(load("ultra"), str(config))
        pruned = preview(loads("version: 1\nsteps:\n  - {op: prune_attention, layers: 66-115}\n"), str(config))
    count = {"parent": fused.before, "pruned": pruned.after, "fused": fused.after}
    weights = {"parent": float(fused.before.parameters), "pruned": 253e9, "fused": 253e9}
    # One behind each attention and each FFN, and one for the embedding.
    return {name: (weights[name], each.attentions + each.ffns + 1) for name, each in count.items()}


def prediction() -> str:
    """Rows of what the model says of Ultra-253B on eight GPUs, beside the paper's."""
    models, size = ultra(), 2 * 16384.0
    counts = ", ".join(f"{name} {reductions}" for name, (_, reductions) in models.items())
    lines = [f"All-reduces a token: {counts}; {size / 1024:.0f} KiB each.\n"]
    lines += [
        "| bandwidth reached | alpha, microseconds | parent, tokens/s | pruned | fused | over pruned | over parent |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for reached in REACHED:
        for alpha in ALPHAS:
            machine = Machine(EIGHT["bandwidth"] * reached, alpha, EIGHT["beta"])
            rates = {name: 1 / machine.step(weights, calls, size) for name, (weights, calls) in models.items()}
            lines.append(f"| {reached:.0%} | {alpha * 1e6:.0f} | {_ratios(rates)}")
    return "\n".join([*lines, f"| the paper, measured | | {_ratios(PAPER)}"])


def _ratios(rates: dict[str, float]) -> str:
    parent, pruned, fused = rates.values()
    return f"{parent:.1f} | {pruned:.1f} | {fused:.1f} | {fused / pruned:.2f}x | {fused / parent:.2f}x |"


def main() -> None:
    """Counts, times or predictions, as asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder of the checkpoints, 2.5 GB, made where they are not there")
    parser.add_argument("--ranks", type=int, action="append", help="may be repeated; default: 2 and 4")
    parser.add_argument("--count", action="store_true", help="count, and time nothing")
    parser.add_argument("--predict", action="store_true", help="Ultra-253B's shape on eight GPUs")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.out:
        rank(arguments.work, arguments.count, arguments.out)
        return
    if arguments.predict:
        print(prediction())
    if arguments.work:
        make(arguments.work)
        for ranks in arguments.ranks or (2, 4):
            print(table(measure(arguments.work, ranks, arguments.count), ranks), "\n", flush=True)


if __name__ == "__main__":
    main()
