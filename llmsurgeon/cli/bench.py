"""`llmsurgeon bench`: is the model really faster?"""

from __future__ import annotations

import json
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("bench")(bench_command)


def bench_command(
    model: Annotated[str, typer.Argument(help="Hub id, folder or GGUF file.", show_default=False)],
    against: Annotated[str | None, typer.Option(help="The parent, timed in turn with MODEL.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences at a time.")] = 1,
    prompt: Annotated[int, typer.Option(help="Tokens of prefill.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Decode steps.")] = 64,
    rounds: Annotated[int, typer.Option(help="Timed rounds, after one to warm up.")] = 5,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: the checkpoint's.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of MODEL on the hub.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time prefill and decode, interleaved with the parent's, and measure weights and KV cache."""
    from llmsurgeon.cli.options import dtype_of
    from llmsurgeon.evaluation.latency import bench_table, benchmark
    from llmsurgeon.formats.loading import load_model

    student = load_model(model, dtype=dtype_of(dtype), device=device, revision=revision)
    parent = load_model(against, dtype=dtype_of(dtype), device=device) if against else None
    result = benchmark(student, parent, batch=batch, prompt=prompt, new_tokens=new_tokens, rounds=rounds)
    if as_json:
        print(json.dumps({"name": model, "parent_name": against, **result.to_dict()}))
        return
    from rich.console import Console

    Console().print(bench_table(result))
