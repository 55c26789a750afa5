"""`llmsurgeon matmulfree`: attentions become MLGRUs, by a recipe or by flags."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llmsurgeon.cli.convert import (
    AsJson,
    Dataset,
    Device,
    DryRun,
    Dtype,
    Job,
    Model,
    Out,
    Overwrite,
    RecipeFile,
    Revision,
    Sets,
    ShardSize,
    Text,
    built,
    go,
    load,
    must_have,
    split,
)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("matmulfree")(matmulfree_command)


def matmulfree_command(
    context: typer.Context,
    model: Model = None,
    recipe: RecipeFile = None,
    out: Out = None,
    layers: Annotated[str | None, typer.Option(help="Layers whose attention goes, e.g. 4,7-9; default: all.")] = None,
    keep_attention: Annotated[str | None, typer.Option(help="Or all but these.")] = None,
    count: Annotated[int | None, typer.Option(help="Or how many; those whose removal costs least.")] = None,
    linears: Annotated[str, typer.Option(help="float, or ternary: BitLinears in mixers and their FFNs.")] = "float",
    context_length: Annotated[
        int | None, typer.Option("--context", help="Tokens that the slowest channels remember.")
    ] = None,
    refit: Annotated[
        bool, typer.Option("--refit/--no-refit", help="Closed-form alignment afterwards; float linears only.")
    ] = True,
    sets: Sets = None,
    text: Text = None,
    dataset: Dataset = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    max_shard_size: ShardSize = "5GB",
    device: Device = "cpu",
    dtype: Dtype = None,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Turn attentions into MLGRUs, whose memory is one state however long the context, by a recipe or by flags.

    Example: llmsurgeon matmulfree MODEL --count 3 --text prose.txt -o OUT.
    """
    if recipe:
        loaded = load(recipe, sets, text, dataset)
        must_have(context, loaded, {"matmulfree"}, "matmulfree")
    else:
        step: dict[str, Any] = {"op": "matmulfree", "linears": linears}
        step |= {key: value for key, value in (("count", count), ("context", context_length)) if value is not None}
        step |= {key: split(value) for key, value in (("layers", layers), ("keep_attention", keep_attention)) if value}
        heals = [{"op": "refit"}] if refit and linears == "float" else []
        loaded = built([step, *heals], sets, text, dataset)
    job = Job(model, out, dry_run, overwrite, max_shard_size, device, dtype, revision, as_json)
    go(loaded, Path(recipe or "matmulfree").stem, job)
