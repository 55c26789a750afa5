"""Conversion beside `cp -r`: wall time and peak anonymous memory on a synthetic bfloat16 Llama.

    python benchmarks/convert.py                                # about 6 GB, needs 20 GB of disk
    python benchmarks/convert.py --gigabytes 1 --repeats 3
    python benchmarks/convert.py --checksums blake3 sha256 none
    python benchmarks/convert.py --mergekit-python ~/mk/bin/python

The source is sharded, untied, and warm in the page cache. Runs are interleaved (cp, llmsurgeon, mergekit, cp, ...),
with everything flushed to disk before each. llmsurgeon drops attentions and fuses FFN runs with their norms folded
in, sums every file and flushes it to disk; `cp` does neither, so `cp + sync` stands beside it. Interpreter start
and imports are outside the time of llmsurgeon and mergekit, and reported.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Imports, then "ready" on stdout; one line on stdin starts the work.
OURS = """
import sys
import llmsurgeon.cli.main  # whose way of ending is the command's
from llmsurgeon.run import Options, run
from llmsurgeon.recipe import recipe
import llmsurgeon.formats.write, transformers.models.llama.modeling_llama
job = recipe.load(sys.argv[1])
print("ready", flush=True); sys.stdin.readline()
run(job, sys.argv[2], sys.argv[3], Options(max_shard_size=sys.argv[4], checksum=sys.argv[5]))
"""
MERGEKIT = """
import sys
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
config = MergeConfiguration.model_validate(yaml.safe_load(open(sys.argv[1])))
print("ready", flush=True); sys.stdin.readline()
run_merge(config, sys.argv[3], MergeOptions(copy_tokenizer=False, lazy_unpickle=True))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=6.0, help="size of the source")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-shard-size", default="2GB", help="of what llmsurgeon writes")
    parser.add_argument("--checksums", nargs="+", default=["blake3"], help="of what llmsurgeon writes, each timed")
    parser.add_argument("--folder", help="where to put source and outputs (default: the temporary folder)")
    parser.add_argument("--mergekit-python", help="interpreter of an environment that has mergekit")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="llmsurgeon-convert-", dir=arguments.folder) as folder:
        report = measure(Path(folder), arguments)
    print(json.dumps(report, indent=2) if arguments.json else as_table(report))


def measure(folder: Path, arguments: argparse.Namespace) -> dict:
    source, out = folder / "source", folder / "out"
    config = llama_config(arguments.gigabytes)
    write_source(source, config)
    dropped, runs = cuts(config["num_hidden_layers"])
    (folder / "recipe.yaml").write_text(recipe(dropped, runs))
    (folder / "merge.yaml").write_text(passthrough(source, config["num_hidden_layers"], runs))
    ours = [sys.executable, "-c", OURS, str(folder / "recipe.yaml"), str(source), str(out), arguments.max_shard_size]
    ways = {f"llmsurgeon, {checksum}": [*ours, checksum] for checksum in arguments.checksums}
    contenders: dict[str, Callable[[], dict[str, float]]] = {
        "cp -r": lambda: copied(source, out, sync=False),
        "cp -r + sync": lambda: copied(source, out, sync=True),
        **{name: partial(converted, command) for name, command in ways.items()},
    }
    if arguments.mergekit_python:
        other = [arguments.mergekit_python, "-c", MERGEKIT, str(folder / "merge.yaml"), str(source), str(out)]
        contenders["mergekit passthrough"] = lambda: converted(other)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for _ in range(arguments.repeats):
        for name, contender in contenders.items():
            warm(source)
            os.sync()
            results[name].append(contender())
            results[name][-1]["bytes"] = size(out)
            shutil.rmtree(out)
    cp = statistics.median(result["seconds"] for result in results["cp -r"])
    rows = {name: summary(runs, cp) for name, runs in results.items()}
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.system()} {platform.release()}"
    return {"machine": machine, "source_bytes": size(source), "repeats": arguments.repeats, "results": rows}


def summary(runs: list[dict[str, float]], cp: float) -> dict[str, float]:
    seconds = [run["seconds"] for run in runs]
    return {
        "median_seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "ratio_to_cp": statistics.median(seconds) / cp,
        "start_seconds": statistics.median(run.get("start", 0.0) for run in runs),
        "peak_anonymous_bytes": max(run.get("anonymous", 0.0) for run in runs),
        "anonymous_before_bytes": max(run.get("before", 0.0) for run in runs),
        "written_bytes": runs[0]["bytes"],
    }


def as_table(report: dict) -> str:
    lines = [
        f"{report['machine']}; source {report['source_bytes'] / 1e9:.2f} GB; {report['repeats']} interleaved runs",
        f"{'':22}{'median s':>10}{'min..max':>16}{'x cp':>7}{'written GB':>12}"
        f"{'anon MB':>9}{'imports':>9}{'start s':>9}",
    ]
    for name, row in report["results"].items():
        spread = f"{row['fastest']:.2f}..{row['slowest']:.2f}"
        lines.append(
            f"{name:22}{row['median_seconds']:10.2f}{spread:>16}{row['ratio_to_cp']:7.2f}"
            f"{row['written_bytes'] / 1e9:12.2f}{row['peak_anonymous_bytes'] / 1e6:9.0f}"
            f"{row['anonymous_before_bytes'] / 1e6:9.0f}{row['start_seconds']:9.1f}"
        )
    lines.append("anon MB: peak anonymous memory of the process; imports: how much of it the imports alone take")
    return "\n".join(lines)


def copied(source: Path, out: Path, sync: bool) -> dict[str, float]:
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(out)], check=True)
    if sync:
        os.sync()
    return {"seconds": time.perf_counter() - start}


def converted(command: list[str]) -> dict[str, float]:
    """Start `command`, wait for its "ready", then time it to its end while sampling its anonymous memory."""
    started = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdin and child.stdout
        while (line := child.stdout.readline()) and line.strip() != "ready":
            pass
        before = anonymous_bytes(child.pid)
        with peak_anonymous(child.pid) as peak:
            start = time.perf_counter()
            child.stdin.write("go\n")
            child.stdin.flush()
            child.stdout.read()
            status = child.wait()
            seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{command[0]} failed with exit code {status}")
    return {"seconds": seconds, "start": start - started, "anonymous": peak[0], "before": before}


@contextmanager
def peak_anonymous(pid: int) -> Iterator[list[int]]:
    """The most anonymous memory of a process while this is entered, as the list's one number."""
    peak, ended = [anonymous_bytes(pid)], threading.Event()

    def sample() -> None:
        while not ended.wait(0.01):
            peak[0] = max(peak[0], anonymous_bytes(pid))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield peak
    finally:
        ended.set()
        sampler.join()


def anonymous_bytes(pid: int) -> int:
    """RssAnon: memory that no file backs. 0 once the process is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def llama_config(gigabytes: float) -> dict:
    """A Llama of about that size: Llama-3-8B's layers from 4 GB on, half as wide below."""
    hidden = 4096 if gigabytes >= 4 else 2048
    width, vocabulary, head_dim = hidden * 7 // 2, 32_000, 128
    layer = 2 * (2 * hidden * hidden + 2 * hidden * hidden // 4 + 3 * hidden * width)
    layers = max(6, round((gigabytes * 1e9 - 4 * vocabulary * hidden) / layer))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // head_dim,
        "num_key_value_heads": hidden // head_dim // 4,
        "head_dim": head_dim,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def tensors(config: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, width, kv = config["hidden_size"], config["intermediate_size"], config["num_key_value_heads"]
    kv *= config["head_dim"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        yield at + "input_layernorm.weight", (hidden,)
        yield at + "mlp.down_proj.weight", (hidden, width)
        yield at + "mlp.gate_proj.weight", (width, hidden)
        yield at + "mlp.up_proj.weight", (width, hidden)
        yield at + "post_attention_layernorm.weight", (hidden,)
        for name, rows in (("k", kv), ("o", hidden), ("q", hidden), ("v", kv)):
            yield f"{at}self_attn.{name}_proj.weight", (rows, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def write_source(folder: Path, config: dict, shard_bytes: int = 2 * 10**9) -> None:
    """Random values from one drawn block, each tensor from another place in it: fast, finite and not compressible."""
    import torch

    from llmsurgeon.checkpoint.safetensors_file import encode_header

    folder.mkdir()
    made = torch.Generator().manual_seed(0)
    pool = (torch.randn(2**24, generator=made) * 0.02).bfloat16().view(torch.uint8).numpy()
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, shape in tensors(config):
        count = 2 * torch.Size(shape).numel()
        if shards[-1] and filled + count > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape))
        filled += count
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        with (folder / file).open("wb") as out:
            out.write(encode_header([(name, torch.bfloat16, shape) for name, shape in shard], {"format": "pt"}))
            for name, shape in shard:
                weight_map[name] = file
                left = 2 * torch.Size(shape).numel()
                at = 2 * int(torch.randint(0, 2**23, (), generator=made))
                while left:
                    piece = pool[at : at + left]
                    out.write(memoryview(piece))
                    left -= len(piece)
                    at = 0
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def cuts(layers: int) -> tuple[list[int], list[list[int]]]:
    """Attention out of the middle layers, and runs of at most four of them."""
    dropped = list(range(layers // 4 + 1, layers - max(1, layers // 6)))
    return dropped, [dropped[i : i + 4] for i in range(0, len(dropped), 4) if len(dropped[i : i + 4]) > 1]


def recipe(dropped: list[int], runs: list[list[int]]) -> str:
    steps = [
        {"op": "prune_attention", "layers": dropped},
        {"op": "fuse_ffn", "runs": runs, "norm": "fold"},
    ]
    return json.dumps({"version": 1, "steps": steps})  # JSON is YAML


def passthrough(source: Path, layers: int, runs: list[list[int]]) -> str:
    """What mergekit can do of it: the layers that the fused ones replace leave the stack."""
    gone = {layer for run in runs for layer in run[1:]}
    slices = [{"sources": [{"model": str(source), "layer_range": [i, i + 1]}]} for i in range(layers) if i not in gone]
    return json.dumps({"merge_method": "passthrough", "dtype": "bfloat16", "slices": slices})


def warm(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
