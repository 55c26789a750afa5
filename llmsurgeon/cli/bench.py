"""`llmsurgeon bench`: is the model really faster?"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmsurgeon.boundary.limits import LONGEST_SEQUENCE, MOST_SEQUENCES
from llmsurgeon.cli import console, say
from llmsurgeon.cli.options import Rounds, TrustRemoteCode, usable_device, usable_threads, whole
from llmsurgeon.errors import SurgeryError

if TYPE_CHECKING:
    from llmsurgeon.evaluation.latency import Bench


class Engine(StrEnum):
    """What `--engine` takes."""

    TRANSFORMERS = "transformers"
    LLAMA_CPP = "llama.cpp"


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("bench")(bench_command)


def bench_command(
    model: Annotated[str, typer.Argument(help="Hub id, folder or GGUF file.", show_default=False)],
    against: Annotated[str | None, typer.Option(help="The parent, timed in turn with MODEL.")] = None,
    engine: Annotated[Engine, typer.Option(help="What runs the models.")] = Engine.TRANSFORMERS,
    batch: Annotated[int, whole("Sequences at a time; 1 in llama.cpp.", 1, MOST_SEQUENCES)] = 1,
    prompt: Annotated[
        int | None,
        whole("Tokens of prefill; default: 512, less on a model of few positions.", 1, LONGEST_SEQUENCE),
    ] = None,
    new_tokens: Annotated[
        int | None, whole("Decode steps; default: 64, less on a model of few positions.", 1, LONGEST_SEQUENCE)
    ] = None,
    rounds: Rounds = 5,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; default: as many as there are.", callback=usable_threads)
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1 ...; cpu in llama.cpp.", callback=usable_device)
    ] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="transformers: float32, bfloat16 or float16; default: the checkpoint's.")
    ] = None,
    type: Annotated[
        str | None, typer.Option(help="llama.cpp: type in which models that are no GGUF file are tried; default: F16.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of MODEL on the hub.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time prefill and decode, interleaved with the parent's, and measure weights and KV cache.

    In llama.cpp, models that are no GGUF file are exported to a temporary one first.
    """
    from llmsurgeon.evaluation.latency import bench_table

    sizes: dict[str, Any] = {"prompt": prompt, "new_tokens": new_tokens, "rounds": rounds}
    if engine is Engine.LLAMA_CPP:
        if batch != 1 or device != "cpu" or dtype:
            raise SurgeryError("--engine llama.cpp times one sequence on the CPU; leave out --batch, --device, --dtype")
        result = _in_llamacpp(model, against, type or "F16", revision, trust_remote_code, threads, sizes)
    else:
        if type:
            raise SurgeryError("--type is for --engine llama.cpp; for transformers there is --dtype")
        result = _in_transformers(model, against, dtype, device, revision, threads, {"batch": batch, **sizes})
    if as_json:
        print(json.dumps({"name": model, "parent_name": against, **result.to_dict()}))
        return

    console().print(bench_table(result))


def _in_transformers(
    model: str,
    against: str | None,
    dtype: str | None,
    device: str,
    revision: str | None,
    threads: int | None,
    sizes: dict[str, Any],
) -> Bench:
    import torch

    from llmsurgeon.cli.options import dtype_of
    from llmsurgeon.evaluation.latency import benchmark
    from llmsurgeon.formats.loading import load_model

    if threads:
        torch.set_num_threads(threads)
    student = load_model(model, dtype=dtype_of(dtype), device=device, revision=revision)
    parent = load_model(against, dtype=dtype_of(dtype), device=device) if against else None
    return benchmark(student, parent, **sizes)


def _in_llamacpp(
    model: str,
    against: str | None,
    type: str,
    revision: str | None,
    trust_remote_code: bool,
    threads: int | None,
    sizes: dict[str, Any],
) -> Bench:
    from llmsurgeon.boundary.foreign import local_path
    from llmsurgeon.checkpoint.passing import passing
    from llmsurgeon.evaluation.latency import benchmark_llamacpp
    from llmsurgeon.evaluation.llamacpp import require_xllamacpp
    from llmsurgeon.export import export_gguf
    from llmsurgeon.planning.options import Options

    require_xllamacpp()  # before anything is exported
    with passing() as folder:

        def as_gguf(name: str, place: str, revision: str | None) -> Path:
            if name.endswith(".gguf") and local_path(name).is_file():
                return local_path(name)
            options = Options(trust_remote_code=trust_remote_code)
            target = str(folder / f"{place}.gguf")
            made = export_gguf(name, target, type=type, options=options, revision=revision)
            for note in made.notes:
                say(f"{name}: {note}")
            return made.path

        student = as_gguf(model, "model", revision)
        parent = as_gguf(against, "parent", None) if against else None
        return benchmark_llamacpp(student, parent, threads=threads, **sizes)
