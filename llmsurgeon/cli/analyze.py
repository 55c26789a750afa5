"""`llmsurgeon analyze`: what can go, measured."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmsurgeon.cli import console, say, tell
from llmsurgeon.cli.options import (
    OVERWRITE,
    Batch,
    Seed,
    TrustRemoteCode,
    dtype_of,
    length_option,
    text_file,
    tokens_option,
    usable_device,
    whole,
)

if TYPE_CHECKING:
    from llmsurgeon.analyze import Analysis

SEQUENCE_LENGTH = 256


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
    tokens: Annotated[int, tokens_option("How many tokens to measure on.")] = 8192,
    seq_len: Annotated[
        int | None, length_option("Tokens in a sequence; default: 256, or the model's positions if fewer.")
    ] = None,
    drop: Annotated[int | None, whole("Attentions to drop; default: about a quarter of the layers.", 0)] = None,
    max_run: Annotated[int, whole("Longest run of FFNs to fuse.")] = 3,
    seed: Seed = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...", callback=usable_device)] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: the checkpoint's.")] = None,
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
    from llmsurgeon.analysis.attention_order import default_count
    from llmsurgeon.analyze import analyze, write_analysis
    from llmsurgeon.checkpoint.staging import existing
    from llmsurgeon.checkpoint.writer import Stage
    from llmsurgeon.planning.inputs import Inputs
    from llmsurgeon.planning.opened import open_model
    from llmsurgeon.planning.options import Options
    from llmsurgeon.planning.texts import Texts
    from llmsurgeon.recipe.recipe import Calibration

    parent = open_model(model, revision, trust_remote_code)
    inputs = Inputs.of("analyze", {"model": parent.checkpoint}, None, Options())
    if text:
        inputs.watch_text("text", text)
    if seq_len is None:
        seq_len = min(SEQUENCE_LENGTH, parent.spec.max_positions or SEQUENCE_LENGTH)
    source = Path(model)
    folder = Path(out or f"{source.stem if source.suffix == '.gguf' else source.name}-analysis")
    # The refit of the suggested recipe wants more text than the scores do.
    fit_tokens = max(tokens, 65_536)
    fit_on = {"text": text, "dataset": dataset, "tokens": fit_tokens, "sequence_length": seq_len}
    # Opened before anything is measured: a folder that cannot be written is heard of at once.
    with Stage.open(
        folder,
        job=inputs.job(),
        overwrite=overwrite,
        sources=(parent.checkpoint.path, *existing(text, dataset)),
    ) as stage:
        calibration = Calibration(text=text, dataset=dataset, tokens=tokens, sequence_length=seq_len, seed=seed)
        options = Options(device=device, dtype=dtype_of(dtype), batch=batch, say=say)
        texts = Texts(parent, calibration, tokens, options)
        windows = texts.windows
        count = default_count(len(parent.spec.layers)) if drop is None else drop
        result = analyze(texts.runner, windows, model, texts.description, count, max_run, batch, say)
        stage.confirm(inputs.check)
        files = [folder / written.name for written in write_analysis(stage, result, fit_on)]
    if as_json:
        print(json.dumps(result.report(), allow_nan=False))
        return
    print_analysis(result, files, fit_tokens)


def print_analysis(result: Analysis, files: list[Path], fit_tokens: int) -> None:
    """The suggestion and the scores behind it; `fit_tokens` is what the suggested recipe is calibrated on."""
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
    for file in files:
        tell(f"wrote {file}")
    suggested = next(file for file in files if file.name == "suggested.yaml")
    tell(f"next: llmsurgeon run {shlex.quote(str(suggested))} -o OUT")
    tell(f"      (its refit takes {fit_tokens:,} tokens; --tokens N for fewer)")
