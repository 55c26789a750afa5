"""`llmsurgeon ternary`: linears become ternary, by a recipe or by flags."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llmsurgeon.cli.convert import add_verb
from llmsurgeon.cli.options import split


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    add_verb(app, "ternary", {"ternary"}, ternary_steps, "ternary")


def ternary_steps(
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
    sub_norm: Annotated[
        bool, typer.Option("--sub-norm", help="An RMSNorm before each ternary output projection, to be trained.")
    ] = False,
    refit: Annotated[bool, typer.Option("--refit/--no-refit", help="Closed-form healing of what stays dense.")] = False,
) -> list[dict[str, Any]]:
    """Make linears ternary: -1, 0, 1 times a scale (BitNet b1.58), by a recipe or by flags.

    Example: llmsurgeon ternary MODEL --linears ffn --share 0.5 --text prose.txt -o OUT.
    """
    step: dict[str, Any] = {"op": "ternary", "linears": linears, "method": method, "scale": scale}
    given = {"share": share, "max_bytes": max_bytes, "group_size": group_size}
    step |= {"granularity": granularity, **{key: value for key, value in given.items() if value is not None}}
    if sub_norm:
        step["sub_norm"] = True
    if layers:
        step["layers"] = split(layers)
    return [step, *([{"op": "refit"}] if refit else [])]
