"""Verbs on a model that memory does not hold: time, memory and what was foreseen, under a limit that the kernel holds.

    python benchmarks/larger_than_memory.py --text calibration.txt                  # 12 GB under 3 GB; 30 GB of disk
    python benchmarks/larger_than_memory.py --text calibration.txt --gigabytes 1.5 --limit 0.9
    python benchmarks/larger_than_memory.py --text calibration.txt --tokens 1024 --verbs analyze run
    python benchmarks/larger_than_memory.py --text calibration.txt --gigabytes 6 --tokens 512 --verbs search

A random bfloat16 Llama is analysed, cut (two attentions out, a pair of FFNs fused), refitted and judged, evaluated
against its parent, exported as GGUF, and searched for a model of 0.9 of its parameters. Each verb is a process of its
own in a control group of that limit, which pages of files count against, too: by systemd-run where systemd runs, else
in a group made for it (needs root).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from convert import llama_config, peak_anonymous, size, write_source  # noqa: E402

GROUP, SYSTEMD = "llmsurgeon-larger-than-memory", Path("/run/systemd/system")
# Version 2 of control groups, version 1: the file with a group's limit.
GROUPS = (
    Path("/sys/fs/cgroup") / GROUP / "memory.max",
    Path("/sys/fs/cgroup/memory") / GROUP / "memory.limit_in_bytes",
)
VERBS = ("analyze", "run", "eval", "export", "search")
SEARCH = (
    "--target params=0.9x --allow prune_attention --allow prune_width --self-share 0 --refit-tokens 4096 "
    "--minutes {minutes} -o {folder}/found --make {folder}/made"
)
RECIPE = """
version: 1
calibration: {{text: {text}, tokens: {tokens}, sequence_length: 256}}
steps:
  - {{op: prune_attention, layers: [{first}, {second}]}}
  - {{op: fuse_ffn, runs: ["{first}-{second}"]}}
  - {{op: refit}}
"""


@contextmanager
def limited(limit: int) -> Iterator[list[str]]:
    """The beginning of a command line whose process may take so many bytes, pages of files included."""
    if SYSTEMD.is_dir():
        yield ["systemd-run", "--scope", "--quiet", "-p", f"MemoryMax={limit}", "-p", "MemorySwapMax=0"]
        return
    group = next(filter(None, (made(most, limit) for most in GROUPS)), None)
    if group is None:
        raise SystemExit("no control group can be made here: run it as root, or where systemd is")
    try:
        yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
    finally:
        group.rmdir()


def made(most: Path, limit: int) -> Path | None:
    """The control group whose file `most` holds the limit, None where groups are of another version, or not ours."""
    group = most.parent
    with suppress(OSError):
        group.mkdir(exist_ok=True)
        if most.exists():
            most.write_text(str(limit))
            return group
        group.rmdir()
    return None


def measured(begin: list[str], arguments: list[str]) -> dict[str, float]:
    """Seconds of a verb, and the most memory that it took, without pages of files."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [*begin, sys.executable, "-m", "llmsurgeon", *arguments, "--quiet"]
    start = time.perf_counter()
    with (
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment) as child,
        peak_anonymous(child.pid) as peak,
    ):
        assert child.stderr
        said = child.stderr.read().decode(errors="replace")
        status = child.wait()
        seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{arguments[0]} ended with exit code {status}: {said[-2000:]}")
    return {"seconds": round(seconds, 1), "anonymous_bytes": peak[0]}


def foreseen(arguments: list[str]) -> dict[str, float]:
    """What `run --dry-run` says of its seconds and memory, without a limit."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "llmsurgeon", *arguments, "--dry-run", "--json"]
    made = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    estimate = json.loads(made.stdout)["estimate"]
    return {"seconds": estimate["seconds"], "anonymous_bytes": estimate["peak_memory_bytes"]}


def byte_tokenizer(folder: Path) -> None:
    """A tokenizer whose tokens are bytes and a pair of them, for a model that knows no words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<unk>", "<s>", "</s>", *letters, "th"]
    made = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, [("t", "h")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="what is calibrated and judged on")
    parser.add_argument("--gigabytes", type=float, default=12.0, help="of the model")
    parser.add_argument("--limit", type=float, default=3.0, help="gigabytes that a process may take")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--verbs", nargs="+", default=list(VERBS), choices=VERBS, help="eval asks for run before it")
    parser.add_argument("--minutes", type=float, default=60, help="that the search may take, about")
    parser.add_argument("--folder", help="where to put the models (default: the temporary folder)")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    arguments = parser.parse_args()
    limit = round(1e9 * arguments.limit)
    with tempfile.TemporaryDirectory(prefix="llmsurgeon-larger-", dir=arguments.folder) as temporary:
        folder = Path(temporary)
        source, out = folder / "source", folder / "out"
        config = llama_config(arguments.gigabytes)
        write_source(source, config)
        byte_tokenizer(source)
        middle = config["num_hidden_layers"] // 2
        recipe = folder / "recipe.yaml"
        text = arguments.text.resolve()
        recipe.write_text(RECIPE.format(text=text, tokens=arguments.tokens, first=middle, second=middle + 1))
        sizes = ["--text", str(text), "--tokens", str(arguments.tokens), "--seq-len", "256"]
        asked = SEARCH.format(folder=folder, minutes=arguments.minutes)
        lines = {
            "analyze": ["analyze", str(source), *sizes, "-o", str(folder / "analysis")],
            "run": ["run", str(recipe), str(source), "-o", str(out)],
            "eval": ["eval", str(out), "--against", str(source), *sizes],
            "export": ["export", str(source), "--to", "gguf", "--type", "Q8_0", "-o", str(folder / "out.gguf")],
            "search": ["search", str(source), *sizes, *shlex.split(asked)],
        }
        report = {
            "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.system()} {platform.release()}",
            "source_bytes": size(source),
            "limit": limit,
            "tokens": arguments.tokens,
            "foreseen": foreseen(lines["run"]) if "run" in arguments.verbs else None,
            "verbs": {},
        }
        for verb in arguments.verbs:
            if verb == "export":
                shutil.rmtree(out, ignore_errors=True)
            with limited(limit) as begin:
                report["verbs"][verb] = measured(begin, lines[verb])
            print(json.dumps({verb: report["verbs"][verb]}), flush=True)
            if arguments.out:
                arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    print(as_table(report))


def as_table(report: dict) -> str:
    """A row for each verb, in Markdown."""
    lines = [
        f"{report['machine']}; {report['source_bytes'] / 1e9:.1f} GB under {report['limit'] / 1e9:.1f} GB; "
        f"{report['tokens']:,} tokens",
        "",
        "| verb | seconds | memory without pages of files, GB |",
        "|---|---:|---:|",
    ]
    rows = dict(report["verbs"]) | ({"run, as foreseen": report["foreseen"]} if report["foreseen"] else {})
    lines += [f"| {name} | {row['seconds']:.0f} | {row['anonymous_bytes'] / 1e9:.2f} |" for name, row in rows.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
