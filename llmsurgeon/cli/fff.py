"""`llmsurgeon fff`: dense FFNs become fast feedforward networks, by a recipe or by flags."""

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
from llmsurgeon.errors import SurgeryError


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("fff")(fff_command)


def fff_command(
    context: typer.Context,
    model: Model = None,
    recipe: RecipeFile = None,
    out: Out = None,
    form: Annotated[str, typer.Option(help="leaf (FFF) or node (UltraFastBERT).")] = "leaf",
    keep: Annotated[float | None, typer.Option(help="Share of the FFN multiplications that stays, e.g. 0.5.")] = None,
    depth: Annotated[int | None, typer.Option(help="Decisions on a path; with --keep at most as many.")] = None,
    leaf_width: Annotated[int | None, typer.Option(help="Neurons of a leaf.")] = None,
    shared: Annotated[int | None, typer.Option(help="Neurons that always work beside the leaf.")] = None,
    trees: Annotated[int | None, typer.Option(help="Trees of the node form; default: enough for all neurons.")] = None,
    layers: Annotated[str | None, typer.Option(help="Layers whose FFN becomes a tree; default: all.")] = None,
    refit: Annotated[bool, typer.Option("--refit/--no-refit", help="Closed-form healing afterwards.")] = True,
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
    """Turn FFNs into trees of which a token visits one path (Fast Feedforward), by a recipe or by flags.

    Example: llmsurgeon fff MODEL --keep 0.5 --text prose.txt -o OUT.
    """
    if recipe:
        loaded = load(recipe, sets, text, dataset)
        must_have(context, loaded, {"fff"}, "fff")
    else:
        if keep is None and depth is None:
            raise SurgeryError("no shape: give --recipe, or --keep, or --depth with --leaf-width (or --form node)")
        given = {"keep": keep, "depth": depth, "leaf_width": leaf_width, "shared": shared, "trees": trees}
        step: dict[str, Any] = {"op": "fff", "form": form, **{k: v for k, v in given.items() if v is not None}}
        if layers:
            step["layers"] = split(layers)
        loaded = built([step, *([{"op": "refit"}] if refit else [])], sets, text, dataset)
    job = Job(model, out, dry_run, overwrite, max_shard_size, device, dtype, revision, as_json)
    go(loaded, Path(recipe or "fff").stem, job)
