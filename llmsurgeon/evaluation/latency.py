"""How fast a model reads a prompt (prefill) and writes (decode), beside its parent, and what it holds in memory.

B batch, T tokens.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmsurgeon.errors import SurgeryError
from llmsurgeon.progress import Progress

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import Cache, PreTrainedModel


@dataclass(frozen=True)
class Spread:
    """One number a round, summarised: median, quartiles and extremes."""

    median: float
    lower_quartile: float
    upper_quartile: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of one value or more."""
        low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        return cls(median(values), low, high, min(values), max(values))


@dataclass(frozen=True)
class Speed:
    """One model's figures. Rates are tokens a second over the whole batch; seconds are of one prefill, one step.

    `memory_bytes` is the weights and the KV cache at its largest; on CUDA `peak_memory_bytes` is what the allocator
    held at most during the run, activations included (None elsewhere: a process's peak cannot be told apart by model).
    `kv_bytes_per_token` is measured from the cache after prefill, so it is smaller than the nominal figure where
    sliding windows are shorter than the prompt.
    """

    prefill_tokens_per_second: Spread
    decode_tokens_per_second: Spread
    prefill_seconds: Spread
    decode_step_seconds: Spread
    parameter_bytes: int
    kv_cache_bytes: int
    kv_bytes_per_token: float
    memory_bytes: int
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class Bench:
    """A model's speed, its parent's, and the speedups: parent seconds / model seconds, paired within each round."""

    model: Speed
    parent: Speed | None
    prefill_speedup: Spread | None
    decode_speedup: Spread | None
    batch: int
    prompt: int
    new_tokens: int
    rounds: int
    device: str
    dtype: str
    threads: int

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dicts, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Round:
    prefill: float
    decode: float
    prompt_cache_bytes: int
    cache_bytes: int
    peak_bytes: int | None


def benchmark(
    model: PreTrainedModel,
    parent: PreTrainedModel | None = None,
    *,
    batch: int = 1,
    prompt: int = 512,
    new_tokens: int = 64,
    rounds: int = 5,
) -> Bench:
    """Time `prompt` tokens of prefill and `new_tokens` greedy decode steps, `rounds` times, parent and model in turn.

    Interleaving parent, model, parent, model ... lets a machine that slows down or speeds up hit both alike; one
    untimed round warms up. Every decode has the same number of steps, the end-of-text token does not stop it.
    Raises SurgeryError for sizes below one or beyond the models' positions, and for differing vocabularies.
    """
    models = [model] if parent is None else [parent, model]
    _check(models, dict(batch=batch, prompt=prompt, new_tokens=new_tokens, rounds=rounds))
    vocab = min(each.config.vocab_size for each in models)
    ids = torch.randint(vocab, (batch, prompt), generator=torch.Generator().manual_seed(0))
    timed: list[list[_Round]] = [[] for _ in models]
    with Progress("bench", (rounds + 1) * len(models), "rounds") as progress:
        for number in range(rounds + 1):
            for each, kept in zip(models, timed, strict=True):
                result = _run(each, ids, new_tokens)
                if number > 0:
                    kept.append(result)
                progress.advance()
    speeds = [_speed(each, kept, ids, new_tokens) for each, kept in zip(models, timed, strict=True)]
    pairs = list(zip(*timed, strict=True)) if parent is not None else []
    return Bench(
        model=speeds[-1],
        parent=speeds[0] if parent is not None else None,
        prefill_speedup=Spread.of([p.prefill / m.prefill for p, m in pairs]) if pairs else None,
        decode_speedup=Spread.of([p.decode / m.decode for p, m in pairs]) if pairs else None,
        batch=batch,
        prompt=prompt,
        new_tokens=new_tokens,
        rounds=rounds,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
    )


@torch.inference_mode()
def _run(model: PreTrainedModel, ids_BT: Tensor, new_tokens: int) -> _Round:
    """One prefill and one decode."""
    model.eval()
    ids_BT = ids_BT.to(model.device)
    # generate() asks for the last position's logits only; so does this, where the model can.
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    cuda = model.device.type == "cuda"
    if cuda:
        held = torch.cuda.memory_allocated(model.device)
        torch.cuda.reset_peak_memory_stats(model.device)
    start = _now(model)
    output = model(input_ids=ids_BT, use_cache=True, **last_only)
    after_prefill = _now(model)
    cache = output.past_key_values
    prompt_cache = cache_bytes(cache)
    decode_start = _now(model)
    for _ in range(new_tokens):
        token_B1 = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token_B1, past_key_values=cache, use_cache=True, **last_only)
    decode = _now(model) - decode_start
    peak = torch.cuda.max_memory_allocated(model.device) - held + parameter_bytes(model) if cuda else None
    return _Round(after_prefill - start, decode, prompt_cache, cache_bytes(cache), peak)


def _now(model: PreTrainedModel) -> float:
    """The time in seconds when the device has finished what it was given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _speed(model: PreTrainedModel, rounds: list[_Round], ids_BT: Tensor, new_tokens: int) -> Speed:
    batch = ids_BT.shape[0]
    weights = parameter_bytes(model)
    cache = max(r.cache_bytes for r in rounds)
    return Speed(
        prefill_tokens_per_second=Spread.of([ids_BT.numel() / r.prefill for r in rounds]),
        decode_tokens_per_second=Spread.of([batch * new_tokens / r.decode for r in rounds]),
        prefill_seconds=Spread.of([r.prefill for r in rounds]),
        decode_step_seconds=Spread.of([r.decode / new_tokens for r in rounds]),
        parameter_bytes=weights,
        kv_cache_bytes=cache,
        kv_bytes_per_token=rounds[0].prompt_cache_bytes / ids_BT.numel(),
        memory_bytes=weights + cache,
        peak_memory_bytes=max((r.peak_bytes for r in rounds if r.peak_bytes is not None), default=None),
    )


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


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _check(models: list[PreTrainedModel], sizes: dict[str, int]) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise SurgeryError(f"bench: {name} is {value}, expected 1 or more")
    length = sizes["prompt"] + sizes["new_tokens"]
    for model in models:
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit and length > limit:
            raise SurgeryError(
                f"{model.config.name_or_path or type(model).__name__}: prompt and new tokens make {length} positions, "
                f"its limit is {limit}; lower --prompt or --new-tokens"
            )


def bench_table(bench: Bench) -> Table:
    """The figures as a rich table: a row a quantity, medians with [quartiles]."""
    from rich.table import Table

    title = f"batch {bench.batch}, prompt {bench.prompt}, {bench.new_tokens} new tokens, {bench.rounds} rounds"
    table = Table(title=f"{title}; {bench.device}, {bench.dtype}, {bench.threads} threads", title_justify="left")
    table.add_column("")
    for name in ("parent", "model", "speedup") if bench.parent else ("model",):
        table.add_column(name, justify="right")
    speeds = [bench.parent, bench.model] if bench.parent else [bench.model]

    def rates(name: str, field: str, speedup: Spread | None) -> None:
        cells = [
            _cell(getattr(speed, field), ",.0f" if getattr(speed, field).median >= 100 else ".3g") for speed in speeds
        ]
        table.add_row(name, *cells, *([_cell(speedup, ".2f") + " x"] if speedup else []))

    def sizes(name: str, field: str, unit: float, form: str) -> None:
        values = [getattr(speed, field) for speed in speeds]
        if None not in values:
            ratio = [f"{values[1] / values[0]:.2f} of parent"] if bench.parent and values[0] else []
            table.add_row(name, *(format(value / unit, form) for value in values), *ratio)

    rates("prefill, tokens/s", "prefill_tokens_per_second", bench.prefill_speedup)
    rates("decode, tokens/s", "decode_tokens_per_second", bench.decode_speedup)
    sizes("weights, MB", "parameter_bytes", 1e6, ",.1f")
    sizes("KV cache, MB", "kv_cache_bytes", 1e6, ",.1f")
    sizes("KV cache, bytes a token", "kv_bytes_per_token", 1, ",.0f")
    sizes("weights + KV cache, MB", "memory_bytes", 1e6, ",.1f")
    sizes("CUDA peak, MB", "peak_memory_bytes", 1e6, ",.1f")
    return table


def _cell(spread: Spread, form: str) -> str:
    low, high = format(spread.lower_quartile, form), format(spread.upper_quartile, form)
    return f"{format(spread.median, form)} [{low}-{high}]"
