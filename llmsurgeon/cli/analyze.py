"""`llmsurgeon analyze`: what can go, measured."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmsurgeon.cli import console, say, tell
from llmsurgeon.cli.options import (
    DEVICE,
    OVERWRITE,
    Batch,
    Dtype,
    Seed,
    SelfShare,
    TrustRemoteCode,
    length_option,
    short_name,
    text_file,
    tokens_option,
    usable_device,
    whole,
)

if TYPE_CHECKING:
    from llmsurgeon.analysis.result import Analysis

FILES = ("report.json", "scores.safetensors", "suggested.yaml", "report.html")


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("analyze")(analyze_command)


def analyze_command(
    model: Annotated[str, typer.Argument(help="Hub id, folder or GGUF file.", show_default=False)],
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="Folder for the report; default: MODEL-analysis.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Calibration text: .txt, .jsonl or .parquet.", callback=text_file)
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Calibration dataset on the hub, NAME[:CONFIG][:SPLIT].")] = None,
    self_share: SelfShare = None,
    tokens: Annotated[int, tokens_option("How many tokens to measure on.")] = 8192,
    seq_len: Annotated[
        int | None, length_option("Tokens in a sequence; default: 256, or the model's positions if fewer.")
    ] = None,
    drop: Annotated[int | None, whole("Attentions to drop; default: about a quarter of the layers.", 0)] = None,
    max_run: Annotated[int, whole("Longest run of FFNs to fuse.")] = 3,
    seed: Seed = 0,
    device: Annotated[str, typer.Option(help=DEVICE, callback=usable_device)] = "auto",
    dtype: Dtype = None,
    batch: Batch = 8,
    revision: Annotated[str | None, typer.Option(help="Revision of MODEL on the hub.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE)] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print report.json on stdout as well.")] = False,
) -> None:
    """Find attentions, FFN runs and blocks that can go; write a report and a recipe that runs as it is.

    Layers are read one at a time, so the model may be larger than memory. Without --text or --dataset the
    calibration text is sampled from the model itself.
    """
    from llmsurgeon.analyze import analyze

    folder = out or f"{short_name(model)}-analysis"
    result = analyze(
        model,
        folder,
        text=text,
        dataset=dataset,
        self_share=self_share,
        tokens=tokens,
        sequence_length=seq_len,
        drop=drop,
        max_run=max_run,
        seed=seed,
        device=device,
        dtype=dtype,
        batch=batch,
        revision=revision,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        say=say,
    )
    if as_json:
        print(json.dumps(result.report(), allow_nan=False))
        return
    print_analysis(result, Path(folder))


def print_analysis(result: Analysis, folder: Path) -> None:
    """The suggestion and the scores behind it, and what lies in the folder now."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    scores = result.measurements.scores
    scale = "" if result.distance == "kl" else "; attn, FFN, block removed: 1 - cos to the parent"
    title = f"{result.model}: {result.layers} layers, {result.text}{scale}"
    # Without lines between the columns it fits 80 characters.
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    # An encoder's removals are scored by the cosine distance of what leaves it.
    removed = ("attn KL", "FFN KL", "block KL") if result.distance == "kl" else ("attn", "FFN", "block")
    columns = ("layer", *removed, "attn sim", "influence", "suggestion")
    for column in columns:
        table.add_column(column, justify="right" if column != "suggestion" else "left", no_wrap=True)
    order = {layer: place + 1 for place, layer in enumerate(result.dropped)}
    run_of = {layer: run for run in result.runs for layer in run}
    for layer in range(result.layers):
        notes = [f"drop (#{order[layer]})"] if layer in order else []
        if layer in run_of:
            notes.append(f"run {run_of[layer][0]}-{run_of[layer][-1]}")
        names = ("attention_kl", "ffn_kl", "block_kl", "attention_similarity", "block_influence")
        table.add_row(str(layer), *(f"{scores[name].mean[layer]:.4f}" for name in names), ", ".join(notes))
    console().print(table)
    for name in FILES:
        tell(f"wrote {folder / name}")
    tell(f"next: llmsurgeon run {shlex.quote(str(folder / 'suggested.yaml'))} -o OUT")
    tell(f"      (its refit takes {result.refit_on['tokens']:,} tokens; --tokens N for fewer)")
