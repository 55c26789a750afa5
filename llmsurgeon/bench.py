"""`bench`: is a model really faster? Prefill and decode, timed in turn with the parent's."""

from __future__ import annotations

import os

from llmsurgeon.boundary.limits import check_threads
from llmsurgeon.engines import ENGINES, Asked
from llmsurgeon.errors import SurgeryError
from llmsurgeon.evaluation.speed import Bench
from llmsurgeon.progress import Say, silent


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
    engine_python: str | os.PathLike[str] | None = None,
    say: Say = silent,
) -> Bench:
    """Time `model` (hub id, folder or GGUF file), in turn with its parent where `against` names one.

    Each round is a prefill of `prompt` tokens and `new_tokens` greedy decode steps, of `batch` sequences; one round
    before the first warms up. In llama.cpp models that are no GGUF file are exported to a temporary one first.

    Args:
        engine: "transformers", "llama.cpp", "openvino" or "vllm".
        prompt, new_tokens: None: 512 and 64, or less where the models have fewer positions.
        threads: of the CPU; None: as many as there are.
        device: "auto" (a card where there is one), "cpu", "cuda" ...; llama.cpp and OpenVINO compute on the CPU, vLLM
            where its build does.
        dtype: computed in, "float32", "bfloat16" or "float16"; None: transformers and vLLM take the checkpoint's own,
            OpenVINO what the machine is fast at. llama.cpp has types instead.
        type: in llama.cpp: the type in which models that are no GGUF file are tried, "F16" unless given; in OpenVINO:
            "int8" or "int4" rounds the weights as optimum-intel does.
        revision: of `model`, on the hub.
        graph: decode as replays of one CUDA graph, as engines do; the cache has its full size from the start.
        trust_remote_code: let code that a tokenizer brings along run; in vLLM, that of the checkpoints.
        engine_python: openvino, vllm: the Python of the environment that the engine is installed in; None: this one.
        say: is told what an export to GGUF has to remark.

    Raises:
        SurgeryError: a model or a size that cannot be, two models that cannot be compared, an engine that is not
            there or cannot do what is asked.
    """
    if engine not in ENGINES:
        raise SurgeryError(f"--engine {engine}: expected one of {', '.join(ENGINES)}")
    if engine_python is not None and not ENGINES[engine].elsewhere:
        others = " and ".join(name for name, each in ENGINES.items() if each.elsewhere)
        raise SurgeryError(f"--engine-python is for --engine {others}; {engine} runs in this environment")
    asked = Asked(
        os.fspath(model),
        None if against is None else os.fspath(against),
        {"prompt": prompt, "new_tokens": new_tokens, "rounds": rounds},
        batch=batch,
        threads=check_threads(threads),
        device=device,
        dtype=dtype,
        type=type,
        revision=revision,
        trust_remote_code=trust_remote_code,
        say=say,
        graph=graph,
        engine_python=None if engine_python is None else os.fspath(engine_python),
    )
    return ENGINES[engine].bench(asked)
