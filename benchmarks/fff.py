"""Hard inference of a fast feedforward layer beside torch's dense one: UltraFastBERT's shape, random real routing.

    python benchmarks/fff.py                            # 768 wide, 4095 neurons, 12 visited; one and two threads
    python benchmarks/fff.py --batches 1 16 --threads 1 --json

Every token has an input of its own and takes its own path; all weights are there. Dense is the fastest of torch's ways
(linear on rows or on their transpose) in each dtype. Runs are interleaved: dense and trees take turns, medians count.
`fastfeedforward` (PyPI) is measured where it is installed: its leaf form, leaves of one neuron, as many decisions.

    python benchmarks/fff.py --models DENSE TREE --batches 1 16 --length 128

times whole models instead: tokens/s of a converted one beside the dense one that it was made from, in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llmsurgeon.modeling.surgeon_fff import NodeFeedForward  # noqa: E402

Way = Callable[[torch.Tensor], torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--depth", type=int, default=11)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 128, 1024, 16384])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each batch size")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: the thread's own time, for one thread on a busy machine",
    )
    parser.add_argument("--models", nargs=2, metavar=("DENSE", "TREE"), help="whole models; batches are then sequences")
    parser.add_argument("--length", type=int, default=128, help="tokens in a sequence, with --models")
    parser.add_argument("--rounds", type=int, default=15, help="how often each of the models runs, with --models")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of --models")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.models:
        if arguments.clock == "cpu":
            parser.error("--clock is for single layers; whole models are timed by the wall")
        whole_models(arguments)
        return
    if arguments.clock == "cpu" and arguments.threads != [1]:
        parser.error("--clock cpu counts one thread: give --threads 1")
    rows = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        ways = {**dense_ways(arguments), **tree_ways(arguments), **package_way(arguments)}
        for batch in arguments.batches:
            rows.append({"threads": threads, "batch": batch, **measured(ways, batch, arguments)})
            print(json.dumps(rows[-1]) if arguments.json else line(rows[-1]), flush=True)
    if not arguments.json:
        print(f"microseconds a token, medians; {platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}")


def whole_models(arguments: argparse.Namespace) -> None:
    """Print tokens/s of both models for each number of threads and sequences."""
    from llmsurgeon.evaluation.latency import benchmark
    from llmsurgeon.formats.loading import load_model

    dense, tree = (load_model(name, dtype=getattr(torch, arguments.dtype)) for name in arguments.models)
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for batch in arguments.batches:
            found = benchmark(tree, dense, batch=batch, prompt=arguments.length, new_tokens=1, rounds=arguments.rounds)
            assert found.parent is not None and found.prefill_speedup is not None
            speeds = [s.prefill_tokens_per_second.median for s in (found.parent, found.model)]
            gain = found.prefill_speedup
            row = {"threads": threads, "batch": batch, "dense": round(speeds[0]), "tree": round(speeds[1])}
            row |= {"speedup": round(gain.median, 3), "quartiles": [gain.lower_quartile, gain.upper_quartile]}
            if arguments.json:
                print(json.dumps(row), flush=True)
                continue
            print(
                f"threads {threads} batch {batch:>3} of {arguments.length} tokens: dense {speeds[0]:,.0f} tokens/s, "
                f"trees {speeds[1]:,.0f} ({gain.median:.2f}x, "
                f"quartiles {gain.lower_quartile:.2f} to {gain.upper_quartile:.2f})",
                flush=True,
            )


def dense_ways(arguments: argparse.Namespace) -> dict[str, Way]:
    """The dense layer of as many neurons, in the ways that torch has."""
    torch.manual_seed(0)
    neurons = 2 ** (arguments.depth + 1) - 1
    up, down = torch.randn(neurons, arguments.hidden) / 28, torch.randn(arguments.hidden, neurons) / 64
    ways: dict[str, Way] = {}
    for name, dtype in (("dense float32", torch.float32), ("dense bfloat16", torch.bfloat16)):
        u, d = up.to(dtype), down.to(dtype)
        ut, dt = u.T.contiguous(), d.T.contiguous()
        ways[name] = lambda x, u=u, d=d: F.linear(F.gelu(F.linear(x.to(u.dtype), u)), d)  # type: ignore[misc]
        ways[name + ", transposed"] = lambda x, u=ut, d=dt: F.gelu(x.to(u.dtype) @ u) @ d  # type: ignore[misc]
    return ways


def tree_ways(arguments: argparse.Namespace) -> dict[str, Way]:
    """One tree of neurons, with each kernel that runs on a CPU."""
    ways: dict[str, Way] = {}
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        torch.manual_seed(0)
        layer = NodeFeedForward(arguments.hidden, arguments.depth, "gelu", False, False, trees=1).to(dtype).eval()
        ways |= {f"{kernel} {name}": layer for kernel in ("numba", "torch")}
    return ways


def package_way(arguments: argparse.Namespace) -> dict[str, Way]:
    """The paper's own package, where it is installed."""
    try:
        from fastfeedforward import FFF
    except ImportError:
        return {}
    torch.manual_seed(0)
    layer = FFF(arguments.hidden, 1, arguments.hidden, arguments.depth, activation=torch.nn.GELU()).eval()
    return {"fastfeedforward float32": layer}


def measured(ways: dict[str, Way], batch: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Way -> median microseconds a token; ways take turns, and those far behind the dense layer take few."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    clock = time.perf_counter if arguments.clock == "wall" else time.thread_time
    inputs = {
        dtype: torch.randn(batch, arguments.hidden, generator=torch.Generator().manual_seed(1)).to(dtype)
        for dtype in (torch.float32, torch.bfloat16)
    }
    with torch.inference_mode():
        end = time.perf_counter() + arguments.seconds
        while time.perf_counter() < end or min(map(len, times.values())) < 4:
            for name, way in ways.items():
                x = inputs[torch.bfloat16 if "bfloat16" in name else torch.float32]
                # Short calls are repeated, so that what the other ways left in the caches is not all that is measured.
                repeats = max(1, 64 // batch) if name.startswith(("numba", "dense")) else 1
                os.environ["LLMSURGEON_FFF_KERNEL"] = name.split()[0] if name.startswith(("numba", "torch")) else "auto"
                begin = clock()
                for _ in range(repeats):
                    way(x)
                times[name].append((clock() - begin) / repeats)
    return {name: round(1e6 * statistics.median(taken[1:]) / batch, 3) for name, taken in times.items()}


def line(row: dict[str, float]) -> str:
    """One row for people."""
    dense = {d: min(v for n, v in row.items() if n.startswith(f"dense {d}")) for d in ("float32", "bfloat16")}
    parts = [
        f"threads {row['threads']} batch {row['batch']:>5}: dense {dense['float32']:.1f} / {dense['bfloat16']:.1f}"
    ]
    for name, taken in row.items():
        if name not in ("threads", "batch") and not name.startswith("dense"):
            parts.append(f"{name} {taken:.2f} ({dense['float32'] / taken:.0f}x)")
    return ", ".join(parts)


if __name__ == "__main__":
    main()
