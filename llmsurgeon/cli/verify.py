"""`llmsurgeon verify`: is a checkpoint whole?"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from llmsurgeon.cli import say, tell
from llmsurgeon.errors import CheckpointError


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("verify")(verify_command)


def verify_command(
    folder: Annotated[str, typer.Argument(help="Folder of a checkpoint.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check a checkpoint: hashes, index, names and shapes against the config, tied weights, one tiny forward pass."""
    from llmsurgeon.verify import verify

    found = verify(folder)
    if as_json:
        report = {"folder": folder, "ok": found.ok, "problems": found.problems, "remarks": found.remarks}
        print(json.dumps(report))
    for remark in found.remarks:
        say(f"note: {remark}")
    if not found.ok:
        raise CheckpointError(f"{folder}: " + "; ".join(p.removeprefix(f"{folder}: ") for p in found.problems))
    if found.packed and not as_json:
        tell(f"{folder}: files are in order; the packed form is for transformers to load, no forward pass was made")
    elif not as_json:
        tell(f"{folder}: files, tensors and a forward pass are in order")
