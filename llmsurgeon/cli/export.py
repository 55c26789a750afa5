"""`llmsurgeon export`: the same model in the form that an engine reads."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from llmsurgeon.cli import say, tell
from llmsurgeon.cli.options import (
    DISCARD,
    OVERWRITE,
    ChecksumKind,
    Private,
    PushToHub,
    TrustRemoteCode,
    short_name,
    target_of,
)
from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats.names import FormName


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("export")(export_command)


def export_command(
    model: Annotated[str, typer.Argument(help="Hub id, folder or GGUF file.", show_default=False)],
    to: Annotated[FormName, typer.Option(help="Form to write.", show_default=False)],
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="Folder, or .gguf file, to write; default: MODEL-FORM.")
    ] = None,
    type: Annotated[
        str | None,
        typer.Option("--type", "--quant", help="gguf: type of the matrices, F16 unless given; Q8_0, Q4_K_M ..."),
    ] = None,
    float_type: Annotated[
        str | None, typer.Option(help="gguf: type of what is not ternary, beside TQ2_0 and TQ1_0; F16 unless given.")
    ] = None,
    pre: Annotated[str | None, typer.Option(help="gguf: the pre-tokenizer's name, where it is not recognised.")] = None,
    modelfile: Annotated[bool, typer.Option("--modelfile", help="gguf: write OUT.Modelfile for Ollama, too.")] = False,
    linear_class: Annotated[
        str | None, typer.Option(help="bitnet: autobitlinear (unpacks on loading) or bitlinear (stays packed, slower).")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE)] = False,
    discard_partial: Annotated[bool, typer.Option("--discard-partial", help=DISCARD)] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest size of a weight file.")] = "5GB",
    checksum: ChecksumKind = "blake3",
    revision: Annotated[str | None, typer.Option(help="Revision of MODEL on the hub.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    push_to_hub: PushToHub = None,
    private: Private = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a checkpoint in another form. What it computes stays the same.

    native: a plain checkpoint of its family; what was cut is filled with zeros, which is exact and not faster.
    nemotron-nas: for vLLM, SGLang, TensorRT-LLM and mlx-lm. surgeon: any model, with code for transformers.
    bitnet: ternary linears packed, for transformers' own quantizer. gguf: one file for llama.cpp.

    Example: llmsurgeon export smollm2-fused --to nemotron-nas -o smollm2-nas.
    """
    from llmsurgeon.export import export, export_gguf
    from llmsurgeon.run import Options

    if linear_class and to != "bitnet":
        raise SurgeryError(f"--linear-class is for --to bitnet, not {to}")
    if linear_class not in (None, "autobitlinear", "bitlinear"):
        raise SurgeryError(f"--linear-class {linear_class}: expected autobitlinear or bitlinear")
    options = Options(
        overwrite=overwrite,
        max_shard_size=max_shard_size,
        discard_partial=discard_partial,
        trust_remote_code=trust_remote_code,
        push=target_of(push_to_hub, private),
        say=say,
        checksum=checksum,
    )
    if to == "gguf":
        kind = type or "F16"
        target = out or f"{short_name(model)}-{kind}.gguf"
        how: dict[str, Any] = {"type": kind, "float_type": float_type, "pre": pre, "modelfile": modelfile}
        file = export_gguf(model, target, **how, options=options, revision=revision)
        report: dict[str, Any] = {"out": str(file.path), "format": "gguf", "architecture": file.architecture}
        report |= {"type": file.type, "bytes": file.size, "notes": list(file.notes)}
        lines = [f"wrote {file.path} ({file.architecture}, {file.type}, {file.size:,} bytes)", *file.notes]
    else:
        if type or float_type or pre or modelfile:
            raise SurgeryError(f"--type, --float-type, --pre and --modelfile are for --to gguf, not {to}")
        reader: Any = linear_class
        target = out or f"{short_name(model)}-{to}"
        made = export(model, target, to, options, revision=revision, linear_class=reader)
        report = {"out": str(made.out), "format": made.format, "loads": made.loads}
        report |= {"before": made.before.to_dict(), "after": made.after.to_dict()}
        lines = [f"wrote {made.out} ({made.format})", made.loads]
    print(json.dumps(report)) if as_json else tell("\n".join(lines))
