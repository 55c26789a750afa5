"""`llmsurgeon fuse`: runs of FFNs become wide ones, by a recipe or by flags."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llmsurgeon.cli.convert import add_verb
from llmsurgeon.cli.options import split
from llmsurgeon.errors import SurgeryError


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    add_verb(app, "fuse", {"fuse_ffn", "parallel_blocks"}, fuse_steps, "fused")


def fuse_steps(
    drop_attention: Annotated[
        str | None, typer.Option(help="Layers whose attention goes, e.g. 4,7,8 or 66-115.")
    ] = None,
    drop_count: Annotated[int | None, typer.Option(help="Or how many; the analysis chooses which.")] = None,
    runs: Annotated[str | None, typer.Option(help="FFN runs to fuse, e.g. 66-73,74-85; default: chosen.")] = None,
    max_run: Annotated[int, typer.Option(help="Longest run when runs are chosen.")] = 4,
    norm: Annotated[str, typer.Option(help="fold (exact) or last (the paper's).")] = "fold",
    refit: Annotated[bool, typer.Option("--refit/--no-refit", help="Closed-form healing afterwards.")] = True,
) -> list[dict[str, Any]]:
    """Fuse runs of FFNs into wide ones (FFN Fusion), by a recipe that fuses or by flags.

    Example: llmsurgeon fuse --recipe ultra.yaml -o OUT; llmsurgeon fuse MODEL --drop-count 8 -o OUT.
    """
    steps: list[dict[str, Any]] = []
    if drop_attention and drop_count is not None:
        raise SurgeryError("give --drop-attention or --drop-count, not both")
    if drop_attention:
        steps.append({"op": "prune_attention", "layers": split(drop_attention)})
    elif drop_count is not None:
        steps.append({"op": "prune_attention", "count": drop_count})
    chosen: Any = split(runs) if runs else "auto"
    steps.append({"op": "fuse_ffn", "runs": chosen, "max_run": max_run, "norm": norm})
    if refit:
        steps.append({"op": "refit"})
    return steps
