"""llama.cpp as an engine: GGUF files timed in turn, each in a process of its own, as it will be served."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from llmsurgeon.checkpoint.gguf.file import GGUFFile
from llmsurgeon.checkpoint.gguf.parts import open_gguf
from llmsurgeon.evaluation.apart import Apart
from llmsurgeon.evaluation.speed import Bench, Round, Task, Timed, bench_of, in_turn, speed_of


def benchmark_llamacpp(
    model: Path,
    parent: Path | None = None,
    *,
    prompt: int | None = None,
    new_tokens: int | None = None,
    rounds: int = 5,
    threads: int | None = None,
) -> Bench:
    """As `latency.benchmark`, of GGUF files in llama.cpp on the CPU, one sequence at a time.

    Raises:
        SurgeryError: xllamacpp is missing, llama.cpp cannot load a file, or sizes that do not fit.
    """
    paths = [model] if parent is None else [parent, model]
    files = [open_gguf(path) for path in paths]
    paths = [file.path for file in files]
    timeds = [
        Timed(
            str(file.path),
            len(file.metadata.get("tokenizer.ggml.tokens", ())),
            _of_architecture(file, "context_length"),
        )
        for file in files
    ]
    task = Task.of(timeds, batch=1, prompt=prompt, new_tokens=new_tokens, rounds=rounds)
    prompt, new_tokens, (ids,) = task.prompt, task.new_tokens, task.ids.tolist()
    with ExitStack() as stack:
        engines = [
            # One token more than is timed comes with the prefill.
            stack.enter_context(Apart(path, context=prompt + new_tokens + 1, threads=threads))
            for path in paths
        ]
        used = engines[0].threads

        def run(engine: Apart, cache: int) -> Round:
            timing = engine.time(ids, new_tokens)
            return Round(timing.prefill, timing.decode, prompt * cache, (prompt + new_tokens) * cache, None)

        caches = [_cache_bytes_per_token(file) for file in files]
        timed = in_turn([partial(run, *each) for each in zip(engines, caches, strict=True)], rounds)
    weights = [sum(entry.end - entry.start for entry in file.entries.values()) for file in files]
    speeds = [speed_of(size, kept, prompt, 1, new_tokens) for size, kept in zip(weights, timed, strict=True)]
    kinds = " and ".join(dict.fromkeys(_file_type(file) for file in files))
    return bench_of(
        speeds, timed, **task.sizes, rounds=rounds, device="cpu", dtype=kinds, threads=used, engine="llama.cpp"
    )


def _of_architecture(file: GGUFFile, key: str) -> Any:
    """A metadata value of the model, which lies under its architecture's name."""
    return file.metadata.get(f"{file.metadata.get('general.architecture')}.{key}")


def _cache_bytes_per_token(file: GGUFFile) -> int:
    """Bytes of keys and values, float16, that a token adds; sliding windows not counted off."""
    heads, blocks = _of_architecture(file, "attention.head_count_kv"), _of_architecture(file, "block_count")
    total = sum(heads) if isinstance(heads, list) else heads * blocks
    width = _of_architecture(file, "attention.key_length") + _of_architecture(file, "attention.value_length")
    return 2 * int(total * width)


def _file_type(file: GGUFFile) -> str:
    """The name that llama.cpp gives to how the matrices are stored, F16 or Q4_K_M."""
    from gguf import LlamaFileType

    try:
        return LlamaFileType(file.metadata.get("general.file_type", -1)).name.split("_", 1)[1]
    except ValueError:
        return "mixed types"
