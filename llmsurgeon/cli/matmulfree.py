"""`llmsurgeon matmulfree`: attentions become MLGRUs, by a recipe or by flags."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llmsurgeon.cli.convert import add_verb
from llmsurgeon.cli.options import split


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    add_verb(app, "matmulfree", {"matmulfree"}, matmulfree_steps, "matmulfree")


def matmulfree_steps(
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
) -> list[dict[str, Any]]:
    """Turn attentions into MLGRUs, whose memory is one state however long the context, by a recipe or by flags.

    Example: llmsurgeon matmulfree MODEL --count 3 --text prose.txt -o OUT.
    """
    step: dict[str, Any] = {"op": "matmulfree", "linears": linears}
    step |= {key: value for key, value in (("count", count), ("context", context_length)) if value is not None}
    step |= {key: split(value) for key, value in (("layers", layers), ("keep_attention", keep_attention)) if value}
    heals = [{"op": "refit"}] if refit and linears == "float" else []
    return [step, *heals]
