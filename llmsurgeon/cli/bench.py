"""`llmsurgeon bench`: is the model really faster?"""

from __future__ import annotations

import json
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from llmsurgeon.boundary.limits import LONGEST_SEQUENCE, MOST_SEQUENCES, check_threads
from llmsurgeon.cli import console, say
from llmsurgeon.cli.options import DEVICE, Rounds, TrustRemoteCode, usable_device, whole

if TYPE_CHECKING:
    from rich.table import Table

    from llmsurgeon.evaluation.speed import Bench, Speedup, Spread


PAIRED = (
    "speedup: the parent's seconds / the model's in the same round, median [quartiles] of these ratios; on a machine "
    "whose speed changes it need not be the ratio of the two medians beside it"
)


class Engine(StrEnum):
    """What `--engine` takes."""

    TRANSFORMERS = "transformers"
    LLAMA_CPP = "llama.cpp"
    OPENVINO = "openvino"
    VLLM = "vllm"


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
        int | None, typer.Option(help="CPU threads; default: as many as there are.", callback=check_threads)
    ] = None,
    device: Annotated[str, typer.Option(help=f"{DEVICE} Others: as built.", callback=usable_device)] = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(help="Computed in: float32, bfloat16 or float16; default: the checkpoint's, in openvino its own."),
    ] = None,
    type: Annotated[
        str | None,
        typer.Option(
            help="llama.cpp: type in which models that are no GGUF file are tried, default F16; openvino: int8 or int4 "
            "weights."
        ),
    ] = None,
    engine_python: Annotated[
        str | None,
        typer.Option(help="openvino, vllm: Python of the environment that has the engine; default: this one's."),
    ] = None,
    graph: Annotated[bool, typer.Option("--graph", help="Decode as replays of a CUDA graph, as engines do.")] = False,
    revision: Annotated[str | None, typer.Option(help="Revision of MODEL on the hub.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time prefill and decode, interleaved with the parent's, and measure weights and KV cache.

    In llama.cpp, models that are no GGUF file are exported to a temporary one first. vLLM and OpenVINO run in an
    environment of their own.
    """
    from llmsurgeon.bench import bench

    result = bench(
        model,
        against,
        engine=engine.value,
        batch=batch,
        prompt=prompt,
        new_tokens=new_tokens,
        rounds=rounds,
        threads=threads,
        device=device,
        dtype=dtype,
        type=type,
        graph=graph,
        revision=revision,
        trust_remote_code=trust_remote_code,
        engine_python=engine_python,
        say=say,
    )
    if as_json:
        print(json.dumps({"name": model, "parent_name": against, **result.to_dict()}))
        return
    console().print(bench_table(result))


def bench_table(bench: Bench) -> Table:
    """The figures as a rich table: a row a quantity, medians with [quartiles]; under it what the speedup is of."""
    from rich.table import Table

    decoded = f", {bench.new_tokens} new tokens" if bench.new_tokens else ""
    graph = ", a CUDA graph" if bench.graph else ""
    title = f"batch {bench.batch}, prompt {bench.prompt}{decoded}{graph}, {bench.rounds} rounds"
    table = Table(
        title=f"{title}; {bench.engine}, {bench.device}, {bench.dtype}, {bench.threads} threads", title_justify="left"
    )
    table.add_column("")
    for name in ("parent", "model", "speedup") if bench.parent else ("model",):
        table.add_column(name, justify="right")
    speeds = [bench.parent, bench.model] if bench.parent else [bench.model]

    def rates(name: str, field: str, speedup: Speedup | None) -> None:
        if getattr(speeds[0], field) is None:
            return
        cells = [
            _cell(getattr(speed, field), ",.0f" if getattr(speed, field).median >= 100 else ".3g") for speed in speeds
        ]
        table.add_row(name, *cells, *([_cell(speedup, ".2f") + " x"] if speedup else []))

    def sizes(name: str, field: str, unit: float, form: str) -> None:
        values = [getattr(speed, field) for speed in speeds]
        if None not in values and (any(values) or not field.startswith("kv_")):
            ratio = [f"{values[1] / values[0]:.2f} of parent"] if bench.parent and values[0] else []
            table.add_row(name, *(format(value / unit, form) for value in values), *ratio)

    once = "prefill" if bench.new_tokens else "forward"
    rates(f"{once}, tokens/s", "prefill_tokens_per_second", bench.prefill_speedup)
    rates("decode, tokens/s", "decode_tokens_per_second", bench.decode_speedup)
    sizes("weights, MB", "parameter_bytes", 1e6, ",.1f")
    sizes("KV cache, MB", "kv_cache_bytes", 1e6, ",.1f")
    sizes("KV cache, bytes a token", "kv_bytes_per_token", 1, ",.0f")
    if bench.new_tokens:
        sizes("weights + KV cache, MB", "memory_bytes", 1e6, ",.1f")
    sizes("CUDA peak, MB", "peak_memory_bytes", 1e6, ",.1f")
    if bench.prefill_speedup:
        found = ((once, bench.prefill_speedup), ("decode", bench.decode_speedup))
        doubts = [_doubt(name, speedup, bench.rounds) for name, speedup in found if speedup and not speedup.clear]
        table.caption = "\n".join([PAIRED, *doubts])
        table.caption_justify = "left"
    return table


def _doubt(name: str, speedup: Speedup, rounds: int) -> str:
    """Why a speedup does not tell which model is faster."""
    from llmsurgeon.evaluation.speed import FEWEST_ROUNDS

    low, high = (format(end, ".2f") for end in speedup.interval)
    if rounds < FEWEST_ROUNDS:
        return f"{name}: {rounds} rounds are too few to tell which is faster; take --rounds {FEWEST_ROUNDS} or more"
    return (
        f"{name}: too noisy to tell which is faster, the median ratio is between {low} and {high}; measure on an idle "
        f"machine, or take more than --rounds {rounds}"
    )


def _cell(spread: Spread, form: str) -> str:
    low, high = format(spread.lower_quartile, form), format(spread.upper_quartile, form)
    return f"{format(spread.median, form)} [{low}-{high}]"
