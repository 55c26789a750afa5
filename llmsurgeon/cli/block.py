"""`llmsurgeon block`: a decoder becomes a block transformer, by a recipe or by flags."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llmsurgeon.cli.convert import add_verb


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    add_verb(app, "block", {"block"}, block_steps, "block-{block_length}")


def block_steps(
    block_length: Annotated[int, typer.Option(help="Tokens in a block: 1, 2, 4 or 8.")] = 4,
    split: Annotated[
        int | None, typer.Option(help="Layers before it attend over blocks, the others within one; default: half.")
    ] = None,
    embedder: Annotated[str, typer.Option(help="projected or concat.")] = "projected",
    decoder: Annotated[str, typer.Option(help="prefix, summation or cross_attention.")] = "prefix",
    prefix_length: Annotated[int, typer.Option(help="Vectors that a block's context is handed on as: 1 or 2.")] = 2,
    refit: Annotated[
        bool, typer.Option("--refit/--no-refit", help="Closed-form start (decoder prefix alone); else the paper's.")
    ] = True,
    minutes: Annotated[
        float | None, typer.Option(help="Train so long afterwards (token cross-entropy); default: not at all.")
    ] = None,
) -> list[dict[str, Any]]:
    """Turn a model into a Block Transformer: attention over blocks of tokens, then within a block.

    Without training it writes little sense: give --minutes, or train it with `llmsurgeon heal`.
    Example: llmsurgeon block MODEL --block-length 2 --minutes 30 --text prose.txt -o OUT.
    """
    given = {"block_length": block_length, "split": split, "prefix_length": prefix_length}
    step: dict[str, Any] = {"op": "block", "embedder": embedder, "decoder": decoder}
    steps = [{**step, **{key: value for key, value in given.items() if value is not None}}]
    if refit and decoder == "prefix":
        steps.append({"op": "refit"})
    if minutes is not None:
        steps.append({"op": "distill", "minutes": minutes, "hidden": 0.0, "kl": 0.0, "cross_entropy": 1.0})
    return steps
