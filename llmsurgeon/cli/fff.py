"""`llmsurgeon fff`: dense FFNs become fast feedforward networks, by a recipe or by flags."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llmsurgeon.cli.convert import add_verb
from llmsurgeon.cli.options import split
from llmsurgeon.errors import SurgeryError


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    add_verb(app, "fff", {"fff"}, fff_steps, "fff")


def fff_steps(
    form: Annotated[str, typer.Option(help="leaf (FFF) or node (UltraFastBERT).")] = "leaf",
    keep: Annotated[float | None, typer.Option(help="Share of the FFN multiplications that stays, e.g. 0.5.")] = None,
    depth: Annotated[int | None, typer.Option(help="Decisions on a path; with --keep at most as many.")] = None,
    leaf_width: Annotated[int | None, typer.Option(help="Neurons of a leaf.")] = None,
    shared: Annotated[int | None, typer.Option(help="Neurons that always work beside the leaf.")] = None,
    trees: Annotated[int | None, typer.Option(help="Trees of the node form; default: enough for all neurons.")] = None,
    layers: Annotated[str | None, typer.Option(help="Layers whose FFN becomes a tree; default: all.")] = None,
    refit: Annotated[bool, typer.Option("--refit/--no-refit", help="Closed-form healing afterwards.")] = True,
) -> list[dict[str, Any]]:
    """Turn FFNs into trees of which a token visits one path (Fast Feedforward), by a recipe or by flags.

    Example: llmsurgeon fff MODEL --keep 0.5 --text prose.txt -o OUT.
    """
    if keep is None and depth is None:
        raise SurgeryError("no shape: give --recipe, or --keep, or --depth with --leaf-width (or --form node)")
    given = {"keep": keep, "depth": depth, "leaf_width": leaf_width, "shared": shared, "trees": trees}
    step: dict[str, Any] = {"op": "fff", "form": form, **{k: v for k, v in given.items() if v is not None}}
    if layers:
        step["layers"] = split(layers)
    return [step, *([{"op": "refit"}] if refit else [])]
