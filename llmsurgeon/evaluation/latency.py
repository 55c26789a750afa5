"""How fast a model reads a prompt (prefill) and writes (decode) in transformers, and what it holds in memory.

B batch, T tokens.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmsurgeon.errors import SurgeryError
from llmsurgeon.evaluation.encoders import encoder_family, name_of, positions_of
from llmsurgeon.evaluation.graphs import GraphedSteps
from llmsurgeon.evaluation.speed import Bench, Round, Task, Timed, bench_of, in_turn, speed_of
from llmsurgeon.formats.caches import cached_call

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


def benchmark(
    model: PreTrainedModel,
    parent: PreTrainedModel | None = None,
    *,
    batch: int = 1,
    prompt: int | None = None,
    new_tokens: int | None = None,
    rounds: int = 5,
    graph: bool = False,
) -> Bench:
    """Time `prompt` tokens of prefill and `new_tokens` greedy decode steps, `rounds` times, parent and model in turn.

    Interleaving parent, model, parent, model ... lets a machine that slows down or speeds up hit both alike; one
    untimed round warms up. Every decode has the same number of steps, the end-of-text token does not stop it.
    graph: decode as replays of a CUDA graph, with a cache of its full size.
    Left out, prompt and new_tokens are 512 and 64, or less where the models have fewer positions.
    Raises SurgeryError for sizes below one or beyond the models' positions, and for differing vocabularies.
    """
    models = [model] if parent is None else [parent, model]
    timeds = [
        Timed(name_of(each), each.config.vocab_size, positions_of(each), encoder_family(each) is not None)
        for each in models
    ]
    task = Task.of(timeds, batch=batch, prompt=prompt, new_tokens=new_tokens, rounds=rounds)
    if graph and any(each.device.type != "cuda" or timed.encoder for each, timed in zip(models, timeds, strict=True)):
        raise SurgeryError("bench: --graph records the decode steps of a decoder on a CUDA device; leave it out")
    timed = in_turn([partial(timed_round, each, task.ids, task.new_tokens, graph) for each in models], rounds)
    speeds = [
        speed_of(parameter_bytes(each), kept, task.ids.numel(), batch, task.new_tokens)
        for each, kept in zip(models, timed, strict=True)
    ]
    return bench_of(
        speeds,
        timed,
        **task.sizes,
        rounds=rounds,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        graph=graph,
    )


@torch.inference_mode()
def timed_round(model: PreTrainedModel, ids_BT: Tensor, new_tokens: int, graph: bool = False) -> Round:
    """One prefill and one decode, as a CUDA graph where asked for; of an encoder one forward pass."""
    model.eval()
    ids_BT = ids_BT.to(model.device)
    encoder = encoder_family(model) is not None
    cuda = model.device.type == "cuda"
    if cuda:
        held = torch.cuda.memory_allocated(model.device)
        torch.cuda.reset_peak_memory_stats(model.device)
    start = _mark(model)
    decode, prompt_cache, cache = None, 0, None
    if encoder:
        # A multiple-choice head takes [batch, choices, tokens].
        model(input_ids=ids_BT[:, None] if type(model).__name__.endswith("MultipleChoice") else ids_BT)
        after_prefill = _mark(model)
    else:
        output, cache = cached_call(model, input_ids=ids_BT, **_last_only(model))
        after_prefill = _mark(model)
        prompt_cache = cache_bytes(cache)
        if graph:
            decode, cache = _replays(model, ids_BT, new_tokens)
        else:
            decode, cache = _steps(model, output, cache, new_tokens)
    peak = torch.cuda.max_memory_allocated(model.device) - held + parameter_bytes(model) if cuda else None
    held_bytes = 0 if cache is None else cache_bytes(cache) + state_bytes(cache)
    return Round(_between(start, after_prefill), decode, prompt_cache, held_bytes, peak)


@torch.inference_mode()
def prompt_read(model: PreTrainedModel, ids_BT: Tensor) -> tuple[Any, Cache]:
    """What a model says after a prompt, and the cache behind it, for `timed_steps`."""
    return cached_call(model.eval(), input_ids=ids_BT.to(model.device), **_last_only(model))


@torch.inference_mode()
def timed_steps(model: PreTrainedModel, read: tuple[Any, Cache], new_tokens: int) -> float:
    """Seconds of greedy decode steps after a prompt that was read before; its cache stays as it is."""
    output, cache = read
    return _steps(model, output, copy.deepcopy(cache), new_tokens)[0]


def _steps(model: PreTrainedModel, output: Any, cache: Cache, new_tokens: int) -> tuple[float, Cache]:
    """Seconds of so many decode steps, and the cache behind them."""
    last_only = _last_only(model)
    start = _mark(model)
    for _ in range(new_tokens):
        token_B1 = output.logits[:, -1:].argmax(-1)
        output, cache = cached_call(model, cache, input_ids=token_B1, **last_only)
    return _between(start, _mark(model)), cache


def _replays(model: PreTrainedModel, ids_BT: Tensor, new_tokens: int) -> tuple[float, Cache]:
    """The same as replays of one CUDA graph."""
    steps = GraphedSteps(model, ids_BT, new_tokens, _last_only(model))
    start = _mark(model)
    for _ in range(new_tokens):
        steps.step()
    return _between(start, _mark(model)), steps.cache


def _last_only(model: PreTrainedModel) -> dict[str, int]:
    """generate() asks for the last position's logits only; so does the bench, where the model can."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _mark(model: PreTrainedModel) -> Any:
    """A point in time: on a card an event behind all that it was given, elsewhere the clock's seconds."""
    if model.device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(first: Any, last: Any) -> float:
    """Seconds from one mark to another; waits until a card has reached the last one."""
    if not hasattr(last, "elapsed_time"):
        return float(last - first)
    last.synchronize()
    return float(first.elapsed_time(last)) / 1000


def parameter_bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters and buffers; tied ones count once."""
    return _bytes([*model.parameters(), *model.buffers()])


def cache_bytes(cache: Cache) -> int:
    """Bytes of the keys and values that a transformers cache holds."""
    return _bytes(
        tensor
        for layer in cache.layers
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if tensor is not None
    )


def state_bytes(cache: Cache) -> int:
    """Bytes of the recurrent states beside them, which do not grow."""
    states = (state for layer in cache.layers for state in getattr(layer, "recurrent_states", {}).values())
    return _bytes(state for state in states if state is not None)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
