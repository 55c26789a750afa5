"""`llmsurgeon ternary`: linears become ternary, by a recipe or by flags."""

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
    app.command("ternary")(ternary_command)


def ternary_command(
    context: typer.Context,
    model: Model = None,
    recipe: RecipeFile = None,
    out: Out = None,
    linears: Annotated[str, typer.Option(help="Whose: ffn, attention or all.")] = "all",
    layers: Annotated[str | None, typer.Option(help="Of which layers, e.g. 4,7-9; default: all.")] = None,
    share: Annotated[
        float | None,
        typer.Option(help="Of these, the cheapest, until this share of their numbers is ternary."),
    ] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Or until the model, packed, is no larger than this.")] = None,
    method: Annotated[str, typer.Option(help="compensated (fitted to text) or round (needs none).")] = "compensated",
    scale: Annotated[str, typer.Option(help="least_squares, absmean or threshold.")] = "least_squares",
    granularity: Annotated[str, typer.Option(help="What has a scale of its own: tensor, row or group.")] = "tensor",
    group_size: Annotated[int | None, typer.Option(help="Numbers of a group, a multiple of 32.")] = None,
    refit: Annotated[bool, typer.Option("--refit/--no-refit", help="Closed-form healing of what stays dense.")] = False,
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
    """Make linears ternary: -1, 0, 1 times a scale (BitNet b1.58), by a recipe or by flags.

    Example: llmsurgeon ternary MODEL --linears ffn --share 0.5 --text prose.txt -o OUT.
    """
    if recipe:
        loaded = load(recipe, sets, text, dataset)
        must_have(context, loaded, {"ternary"}, "ternary")
    else:
        step: dict[str, Any] = {"op": "ternary", "linears": linears, "method": method, "scale": scale}
        given = {"share": share, "max_bytes": max_bytes, "group_size": group_size}
        step |= {"granularity": granularity, **{key: value for key, value in given.items() if value is not None}}
        if layers:
            step["layers"] = split(layers)
        loaded = built([step, *([{"op": "refit"}] if refit else [])], sets, text, dataset)
    job = Job(model, out, dry_run, overwrite, max_shard_size, device, dtype, revision, as_json)
    go(loaded, Path(recipe or "ternary").stem, job)
