"""`bench`: is a model really faster? Prefill and decode, timed in turn with the parent's."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmsurgeon.boundary.foreign import local_path
from llmsurgeon.boundary.limits import check_threads
from llmsurgeon.checkpoint.passing import passing
from llmsurgeon.errors import SurgeryError
from llmsurgeon.evaluation.latency import benchmark
from llmsurgeon.evaluation.llamacpp import benchmark_llamacpp, require_xllamacpp
from llmsurgeon.evaluation.speed import Bench
from llmsurgeon.evaluation.threads import threads_of_torch
from llmsurgeon.export import export_gguf
from llmsurgeon.formats.devices import chosen_device
from llmsurgeon.formats.loading import dtype_of, load_model
from llmsurgeon.planning.options import Options
from llmsurgeon.progress import Say, silent


@dataclass(frozen=True)
class Wanted:
    """What is to be timed, and how, as `bench` was asked."""

    model: str
    against: str | None
    sizes: dict[str, Any]
    batch: int
    threads: int | None
    device: str
    dtype: str | None
    type: str | None
    revision: str | None
    trust_remote_code: bool
    say: Say
    graph: bool


def bench(
    model: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    engine: str = "transformers",
    batch: int = 1,
    prompt: int | None = None,
    new_tokens: int | None = None,
    rounds: int = 5,
    threads: int | None = None,
    device: str = "auto",
    dtype: str | None = None,
    type: str | None = None,
    revision: str | None = None,
    graph: bool = False,
    trust_remote_code: bool = False,
    say: Say = silent,
) -> Bench:
    """Time `model` (hub id, folder or GGUF file), in turn with its parent where `against` names one.

    Each round is a prefill of `prompt` tokens and `new_tokens` greedy decode steps, of `batch` sequences; one round
    before the first warms up. In llama.cpp models that are no GGUF file are exported to a temporary one first.

    Args:
        engine: "transformers" or "llama.cpp".
        prompt, new_tokens: None: 512 and 64, or less where the models have fewer positions.
        threads: of the CPU; None: as many as there are.
        device: "auto" (a card where there is one), "cpu", "cuda" ...; llama.cpp computes on the CPU.
        dtype: in transformers: "float32", "bfloat16" or "float16"; None: the checkpoint's own.
        type: in llama.cpp: the type in which models that are no GGUF file are tried, "F16" unless given.
        revision: of `model`, on the hub.
        graph: decode as replays of one CUDA graph, as engines do; the cache has its full size from the start.
        trust_remote_code: let code that a tokenizer brings along run.
        say: is told what an export to GGUF has to remark.

    Raises:
        SurgeryError: a model or a size that cannot be, two models that cannot be compared, an engine that is not
            there or cannot do what is asked.
    """
    if engine not in ENGINES:
        raise SurgeryError(f"--engine {engine}: expected one of {', '.join(ENGINES)}")
    wanted = Wanted(
        os.fspath(model),
        None if against is None else os.fspath(against),
        {"prompt": prompt, "new_tokens": new_tokens, "rounds": rounds},
        batch,
        check_threads(threads),
        device,
        dtype,
        type,
        revision,
        trust_remote_code,
        say,
        graph,
    )
    return ENGINES[engine](wanted)


def _in_transformers(wanted: Wanted) -> Bench:
    if wanted.type:
        raise SurgeryError("--type is for --engine llama.cpp; for transformers there is --dtype")
    dtype, device = dtype_of(wanted.dtype), chosen_device(wanted.device)
    with threads_of_torch(wanted.threads):
        student = load_model(wanted.model, dtype=dtype, device=device, revision=wanted.revision)
        parent = load_model(wanted.against, dtype=dtype, device=device) if wanted.against else None
        return benchmark(student, parent, batch=wanted.batch, graph=wanted.graph, **wanted.sizes)


def _in_llamacpp(wanted: Wanted) -> Bench:
    if wanted.batch != 1 or wanted.device not in ("auto", "cpu") or wanted.dtype or wanted.graph:
        raise SurgeryError(
            "--engine llama.cpp times one sequence on the CPU; leave out --batch, --device, --dtype, --graph"
        )
    require_xllamacpp()  # before anything is exported
    with passing() as folder:
        student = _as_gguf(wanted, wanted.model, folder / "model.gguf", wanted.revision)
        parent = _as_gguf(wanted, wanted.against, folder / "parent.gguf") if wanted.against else None
        return benchmark_llamacpp(student, parent, threads=wanted.threads, **wanted.sizes)


# How each engine times; each refuses what it cannot do.
ENGINES: dict[str, Callable[[Wanted], Bench]] = {"transformers": _in_transformers, "llama.cpp": _in_llamacpp}


def _as_gguf(wanted: Wanted, name: str, target: Path, revision: str | None = None) -> Path:
    """The GGUF file of this name, or the one that a model in another form is exported to."""
    if name.endswith(".gguf") and local_path(name).is_file():
        return local_path(name)
    options = Options(trust_remote_code=wanted.trust_remote_code)
    made = export_gguf(name, str(target), type=wanted.type or "F16", options=options, revision=revision)
    for note in made.notes:
        wanted.say(f"{name}: {note}")
    return made.path
