"""`llmsurgeon inspect`: what is in a model, layer by layer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from llmsurgeon.cli import console, tell

if TYPE_CHECKING:
    from rich.table import Table

    from llmsurgeon.inspect import Inspected


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("inspect")(inspect_command)


def inspect_command(
    model: Annotated[str, typer.Argument(help="Hub id, folder, config.json or GGUF file.", show_default=False)],
    revision: Annotated[str | None, typer.Option(help="Revision of MODEL on the hub.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the blocks of a model: attention, FFN and parameters of each. A config.json is enough.

    Of a model on this disk its weights are looked at, too: which linears are ternary, and whether config.json is right
    about them.
    """
    from llmsurgeon.inspect import inspect

    found = inspect(model, revision=revision)
    if as_json:
        print(json.dumps(found.to_dict()))
        return
    console().print(_table(found))
    for problem in found.problems:
        tell(f"not in order: {problem}")


def _table(found: Inspected) -> Table:
    """A row a layer; the column of ternary linears is there where some are."""
    from rich.table import Table

    from llmsurgeon.model.costs import human

    table = Table(title=_title(found), title_justify="left")
    some = any(row.ternary for row in found.layers)
    for column in ("block", "attention", "FFN", "parameters", *(("ternary",) if some else ())):
        table.add_column(column, justify="right" if column in ("block", "parameters") else "left")
    for row in found.layers:
        cells = [
            str(row.number),
            " | ".join(part.label for part in row.attention) or "-",
            " | ".join(part.label for part in row.ffn) or "-",
            human(row.parameters),
        ]
        if some:
            cells.append(", ".join(path.rpartition(".")[2] for path in row.ternary or ()) or "-")
        table.add_row(*cells)
    return table


def _title(found: Inspected) -> str:
    from llmsurgeon.model.costs import human

    cache = found.costs.kv_bytes_per_token
    title = f"{found.model}: {found.model_type}, {human(found.costs.parameters)} parameters, "
    title += f"{cache:,} KV bytes a token" if cache else "no KV cache"
    return f"{title}\n{found.block_transformer.sentence()}" if found.block_transformer else title
