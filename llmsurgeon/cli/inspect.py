"""`llmsurgeon inspect` and `verify`: what is in a checkpoint, and is it whole?"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmsurgeon.cli import console, say, tell
from llmsurgeon.errors import CheckpointError, SurgeryError

if TYPE_CHECKING:
    from llmsurgeon.planning.opened import DescribedModel


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command("inspect")(inspect_command)
    app.command("verify")(verify_command)


def inspect_command(
    model: Annotated[str, typer.Argument(help="Hub id, folder, config.json or GGUF file.", show_default=False)],
    revision: Annotated[str | None, typer.Option(help="Revision of MODEL on the hub.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the blocks of a model: attention, FFN and parameters of each. A config.json is enough.

    Of a model on this disk its weights are looked at, too: which linears are ternary, and whether config.json is right
    about them.
    """
    from llmsurgeon.model.costs import human, layer_rows
    from llmsurgeon.planning.opened import shapes_of, ternary_by_layer

    parent, problems = _what_is_known(model, revision)
    shapes = shapes_of(parent.meta())
    total = parent.costs(parent.spec, shapes)
    rows = layer_rows(parent.spec, parent.family, shapes)
    ternary = ternary_by_layer(parent) or []
    for row, linears in zip(rows, ternary, strict=False):
        row["ternary"] = list(linears)
    if as_json:
        report: dict[str, Any] = {"model": model, "model_type": parent.model_type, **total.to_dict()}
        halves = {"block_transformer": asdict(parent.spec.block_transformer)} if parent.spec.block_transformer else {}
        print(json.dumps({**report, **halves, "problems": problems, "remarks": list(parent.notes), "layers": rows}))
        return
    from rich.table import Table

    title = f"{model}: {parent.model_type}, {human(total.parameters)} parameters, " + (
        f"{total.kv_bytes_per_token:,} KV bytes a token" if total.kv_bytes_per_token else "no KV cache"
    )
    if parent.spec.block_transformer:
        title += f"\n{parent.spec.block_transformer.sentence()}"
    table = Table(title=title, title_justify="left")
    some = any(ternary)
    for column in ("block", "attention", "FFN", "parameters", *(("ternary",) if some else ())):
        table.add_column(column, justify="right" if column in ("block", "parameters") else "left")
    for row in rows:
        heads = [
            f"MLGRU {a['width']}" + (", ternary" if a["linears"] == "ternary" else "")
            if "kind" in a
            else f"{a['heads']} heads, {a['kv_heads']} KV, width {a['head_dim']}"
            + (f", window {a['window']}" if a["window"] else "")
            + (", normed" if a["sub_norm"] else "")
            for a in row["attention"]
        ]
        widths = [
            f"{f['kind']} {f['width']}"
            + (f" x {f['experts']}, {f['per_token']} a token" if "experts" in f else "")
            + (f": {f['words']}; {f['active']} a token" if "words" in f else "")
            + (", normed" if f.get("sub_norm") else "")
            for f in row["ffn"]
        ]
        joined = " | ".join(heads) or "-", " | ".join(widths) or "-"
        names = ", ".join(path.rpartition(".")[2] for path in row["ternary"]) if some else ""
        table.add_row(str(row["block"]), *joined, human(row["parameters"]), *((names or "-",) if some else ()))
    console().print(table)
    for problem in problems:
        tell(f"not in order: {problem}")


def _what_is_known(model: str, revision: str | None) -> tuple[DescribedModel, list[str]]:
    """The model as far as it can be opened, and what keeps the rest of the commands from using it."""
    from llmsurgeon.planning.opened import open_config, open_known

    try:
        return open_known(model, revision), []
    except SurgeryError as error:
        try:
            return open_config(model, revision), [str(error)]
        except SurgeryError:
            raise error from None


def verify_command(
    folder: Annotated[str, typer.Argument(help="Folder of a checkpoint.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check a checkpoint: hashes, index, names and shapes against the config, tied weights, one tiny forward pass."""
    from llmsurgeon.boundary.foreign import local_path
    from llmsurgeon.checkpoint.manifest import verify_files

    place = local_path(folder)
    if not place.is_dir():
        what = "is a file" if place.exists() else "no such folder"
        raise SurgeryError(f"{folder}: {what}; verify takes the folder of a checkpoint")
    problems = verify_files(place)
    remarks: list[str] = []
    packed = not problems and _is_packed(folder)
    if not problems and not packed:
        problems, remarks = _model_problems(folder)
    if as_json:
        print(json.dumps({"folder": folder, "ok": not problems, "problems": problems, "remarks": remarks}))
    for remark in remarks:
        say(f"note: {remark}")
    if problems:
        raise CheckpointError(f"{folder}: " + "; ".join(p.removeprefix(f"{folder}: ") for p in problems))
    if packed and not as_json:
        tell(f"{folder}: files are in order; the packed form is for transformers to load, no forward pass was made")
    elif not as_json:
        tell(f"{folder}: files, tensors and a forward pass are in order")


def _is_packed(folder: str) -> bool:
    from llmsurgeon.checkpoint.source import open_checkpoint
    from llmsurgeon.formats.forms import form_of

    try:
        return form_of(open_checkpoint(folder).config).unread is not None
    except SurgeryError:
        return False  # what is wrong with it is said by what comes next


def _model_problems(folder: str) -> tuple[list[str], list[str]]:
    """What is wrong with a checkpoint, and what is to be said of it."""
    import torch

    from llmsurgeon.checkpoint.finite import first_not_finite, is_finite
    from llmsurgeon.checkpoint.source import open_checkpoint
    from llmsurgeon.formats.models import fill
    from llmsurgeon.formats.reading import read_model

    try:
        checkpoint = open_checkpoint(folder)
        damaged = [name for name in checkpoint if not is_finite(checkpoint[name])]
        if damaged:
            more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
            return [f"tensor {damaged[0]}{more} holds NaN or infinity: the weights are damaged, get them anew"], []
        made = read_model(checkpoint)
        # As stored, float16 on a CPU, too: where that overflows, it does so elsewhere.
        fill(made.empty, made.weights, made.dtype, "cpu")
    except SurgeryError as error:
        return [str(error)], []
    problems, remarks = list(made.contradictions), list(made.remarks)
    model = made.empty
    ids = torch.arange(4)[None] % len(model.get_input_embeddings().weight)
    if type(model).__name__.endswith("MultipleChoice"):
        ids = ids[None]
    if broken := first_not_finite(model, made.dtype, input_ids=ids):
        problems.append(f"a forward pass breaks: {broken}")
    return problems, remarks
