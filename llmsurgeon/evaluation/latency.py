"""How fast a model reads a prompt (prefill) and writes (decode), beside its parent, and what it holds in memory.

B batch, T tokens.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from math import comb
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmsurgeon.errors import SurgeryError
from llmsurgeon.evaluation.encoders import encoder_family, name_of, positions_of
from llmsurgeon.evaluation.llamacpp import LlamaCpp
from llmsurgeon.formats.caches import cached_call
from llmsurgeon.progress import Progress

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import Cache, PreTrainedModel

    from llmsurgeon.checkpoint.gguf.file import GGUFFile


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


# Fewer pairs do not tell a speedup from noise: with five, all of them on one side of 1 have a chance of 1 in 16.
FEWEST_ROUNDS = 5


@dataclass(frozen=True)
class Speedup(Spread):
    """Parent's seconds / model's seconds, one ratio a round: both were timed one after the other in it.

    interval: of the median ratio at 95 % by order statistics (Conover, Practical Nonparametric Statistics, 3.2), all of
        the ratios where there are five or fewer.
    clear: whether that is enough to call the model faster or slower: five ratios or more, and 1 is outside.
    """

    interval: tuple[float, float]
    clear: bool

    @classmethod
    def of(cls, values: Sequence[float]) -> Speedup:
        """The speedup of one ratio or more."""
        ranked, count = sorted(values), len(values)
        left_out, below = 0, 0.5**count
        while 2 * below <= 0.05:
            left_out += 1
            below += comb(count, left_out) * 0.5**count
        left_out = max(left_out - 1, 0)
        low, high = ranked[left_out], ranked[-1 - left_out]
        plain = Spread.of(values)
        clear = count >= FEWEST_ROUNDS and not low <= 1 <= high
        return cls(**asdict(plain), interval=(low, high), clear=clear)


@dataclass(frozen=True)
class Speed:
    """One model's figures. Rates are tokens a second over the whole batch; seconds are of one prefill, one step.

    `memory_bytes` is the weights and the KV cache at its largest; on CUDA `peak_memory_bytes` is what the allocator
    held at most during the run, activations included (None elsewhere: a process's peak cannot be told apart by model).
    `kv_bytes_per_token` is measured from the cache after prefill, so it is smaller than the nominal figure where
    sliding windows are shorter than the prompt. An encoder's prefill is one forward pass; it decodes nothing and has
    no cache.
    """

    prefill_tokens_per_second: Spread
    decode_tokens_per_second: Spread | None
    prefill_seconds: Spread
    decode_step_seconds: Spread | None
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
    prefill_speedup: Speedup | None
    decode_speedup: Speedup | None
    batch: int
    prompt: int
    new_tokens: int
    rounds: int
    device: str
    dtype: str
    threads: int
    engine: str = "transformers"

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dicts, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Round:
    prefill: float
    decode: float | None
    prompt_cache_bytes: int
    cache_bytes: int
    peak_bytes: int | None


PROMPT, NEW_TOKENS = 512, 64


def benchmark(
    model: PreTrainedModel,
    parent: PreTrainedModel | None = None,
    *,
    batch: int = 1,
    prompt: int | None = None,
    new_tokens: int | None = None,
    rounds: int = 5,
) -> Bench:
    """Time `prompt` tokens of prefill and `new_tokens` greedy decode steps, `rounds` times, parent and model in turn.

    Interleaving parent, model, parent, model ... lets a machine that slows down or speeds up hit both alike; one
    untimed round warms up. Every decode has the same number of steps, the end-of-text token does not stop it.
    Left out, prompt and new_tokens are 512 and 64, or less where the models have fewer positions.
    Raises SurgeryError for sizes below one or beyond the models' positions, and for differing vocabularies.
    """
    models = [model] if parent is None else [parent, model]
    encoders = [encoder_family(each) is not None for each in models]
    if encoders[0] != encoders[-1]:
        raise SurgeryError("bench: one of the models is an encoder and the other a decoder; they do different work")
    prompt, new_tokens = _lengths(prompt, 0 if encoders[0] else new_tokens, [positions_of(each) for each in models])
    _check_sizes(dict(batch=batch, prompt=prompt, rounds=rounds) | ({} if encoders[0] else {"new_tokens": new_tokens}))
    for each in models:
        _check_length(name_of(each), prompt + new_tokens, positions_of(each))
    vocab = min(each.config.vocab_size for each in models)
    ids = torch.randint(vocab, (batch, prompt), generator=torch.Generator().manual_seed(0))
    timed = _in_turn([partial(_run, each, ids, new_tokens) for each in models], rounds)
    speeds = [
        _speed(parameter_bytes(each), kept, ids.numel(), batch, new_tokens)
        for each, kept in zip(models, timed, strict=True)
    ]
    return _bench(
        speeds,
        timed,
        batch=batch,
        prompt=prompt,
        new_tokens=new_tokens,
        rounds=rounds,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
    )


def benchmark_llamacpp(
    model: Path,
    parent: Path | None = None,
    *,
    prompt: int | None = None,
    new_tokens: int | None = None,
    rounds: int = 5,
    threads: int | None = None,
) -> Bench:
    """The same as `benchmark`, of GGUF files in llama.cpp on the CPU, one sequence at a time.

    Raises:
        SurgeryError: xllamacpp is missing, llama.cpp cannot load a file, or sizes that do not fit.
    """
    from llmsurgeon.checkpoint.gguf.parts import open_gguf

    paths = [model] if parent is None else [parent, model]
    files = [open_gguf(path) for path in paths]
    paths = [file.path for file in files]
    prompt, new_tokens = _lengths(prompt, new_tokens, [_of_architecture(file, "context_length") for file in files])
    sizes = dict(prompt=prompt, new_tokens=new_tokens, rounds=rounds)
    _check_sizes(sizes)
    vocab = min(len(file.metadata.get("tokenizer.ggml.tokens", ())) for file in files)
    for file in files:
        _check_length(str(file.path), prompt + new_tokens, _of_architecture(file, "context_length"))
    ids = torch.randint(vocab, (prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    with ExitStack() as stack:
        engines = [
            # One token more than is timed comes with the prefill.
            stack.enter_context(LlamaCpp(path, context=prompt + new_tokens + 1, threads=threads))
            for path in paths
        ]
        used = engines[0].threads

        def run(engine: LlamaCpp, cache: int) -> _Round:
            timing = engine.time(ids, new_tokens)
            return _Round(timing.prefill, timing.decode, prompt * cache, (prompt + new_tokens) * cache, None)

        caches = [_cache_bytes_per_token(file) for file in files]
        timed = _in_turn([partial(run, *each) for each in zip(engines, caches, strict=True)], rounds)
    weights = [sum(entry.end - entry.start for entry in file.entries.values()) for file in files]
    speeds = [_speed(size, kept, prompt, 1, new_tokens) for size, kept in zip(weights, timed, strict=True)]
    kinds = " and ".join(dict.fromkeys(_file_type(file) for file in files))
    return _bench(speeds, timed, batch=1, **sizes, device="cpu", dtype=kinds, threads=used, engine="llama.cpp")


def _in_turn(runs: Sequence[Callable[[], _Round]], rounds: int) -> list[list[_Round]]:
    """The rounds of each, A B A B ..., after one untimed round of each."""
    timed: list[list[_Round]] = [[] for _ in runs]
    with Progress("bench", (rounds + 1) * len(runs), "rounds") as progress:
        for number in range(rounds + 1):
            for run, kept in zip(runs, timed, strict=True):
                result = run()
                if number > 0:
                    kept.append(result)
                progress.advance()
    return timed


def _bench(speeds: list[Speed], timed: list[list[_Round]], **how: Any) -> Bench:
    """The parent's figures, if there is one, come first."""
    pairs = list(zip(*timed, strict=True)) if len(timed) > 1 else []
    return Bench(
        model=speeds[-1],
        parent=speeds[0] if pairs else None,
        prefill_speedup=Speedup.of([p.prefill / m.prefill for p, m in pairs]) if pairs else None,
        decode_speedup=_ratios([p.decode for p, _ in pairs], [m.decode for _, m in pairs]),
        **how,
    )


@torch.inference_mode()
def _run(model: PreTrainedModel, ids_BT: Tensor, new_tokens: int) -> _Round:
    """One prefill and one decode; of an encoder one forward pass."""
    model.eval()
    ids_BT = ids_BT.to(model.device)
    encoder = encoder_family(model) is not None
    # generate() asks for the last position's logits only; so does this, where the model can.
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    cuda = model.device.type == "cuda"
    if cuda:
        held = torch.cuda.memory_allocated(model.device)
        torch.cuda.reset_peak_memory_stats(model.device)
    start = _now(model)
    decode, prompt_cache, cache = None, 0, None
    if encoder:
        # A multiple-choice head takes [batch, choices, tokens].
        model(input_ids=ids_BT[:, None] if type(model).__name__.endswith("MultipleChoice") else ids_BT)
        after_prefill = _now(model)
    else:
        output, cache = cached_call(model, input_ids=ids_BT, **last_only)
        after_prefill = _now(model)
        prompt_cache = cache_bytes(cache)
        decode_start = _now(model)
        for _ in range(new_tokens):
            token_B1 = output.logits[:, -1:].argmax(-1)
            output, cache = cached_call(model, cache, input_ids=token_B1, **last_only)
        decode = _now(model) - decode_start
    peak = torch.cuda.max_memory_allocated(model.device) - held + parameter_bytes(model) if cuda else None
    held_bytes = 0 if cache is None else cache_bytes(cache) + state_bytes(cache)
    return _Round(after_prefill - start, decode, prompt_cache, held_bytes, peak)


def _now(model: PreTrainedModel) -> float:
    """The time in seconds when the device has finished what it was given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _speed(weights: int, rounds: list[_Round], tokens: int, batch: int, new_tokens: int) -> Speed:
    """Figures of a model of `weights` bytes that read `tokens` tokens in `batch` sequences a round."""
    cache = max(r.cache_bytes for r in rounds)
    decodes = [r.decode for r in rounds if r.decode is not None]
    return Speed(
        prefill_tokens_per_second=Spread.of([tokens / r.prefill for r in rounds]),
        decode_tokens_per_second=Spread.of([batch * new_tokens / decode for decode in decodes]) if decodes else None,
        prefill_seconds=Spread.of([r.prefill for r in rounds]),
        decode_step_seconds=Spread.of([decode / new_tokens for decode in decodes]) if decodes else None,
        parameter_bytes=weights,
        kv_cache_bytes=cache,
        kv_bytes_per_token=rounds[0].prompt_cache_bytes / tokens,
        memory_bytes=weights + cache,
        peak_memory_bytes=max((r.peak_bytes for r in rounds if r.peak_bytes is not None), default=None),
    )


def _ratios(theirs: list[float | None], mine: list[float | None]) -> Speedup | None:
    ratios = [a / b for a, b in zip(theirs, mine, strict=True) if a is not None and b is not None]
    return Speedup.of(ratios) if ratios else None


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


def _lengths(prompt: int | None, new_tokens: int | None, limits: Sequence[int | None]) -> tuple[int, int]:
    """The lengths that are given, and for those that are left out the defaults, lowered to the models' positions."""
    limit = min([each for each in limits if each], default=PROMPT + NEW_TOKENS)
    if new_tokens is None:
        new_tokens = min(NEW_TOKENS, max(1, limit // 4 if prompt is None else limit - prompt))
    return (max(1, min(PROMPT, limit - new_tokens)) if prompt is None else prompt), new_tokens


def _check_sizes(sizes: dict[str, int]) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise SurgeryError(f"bench: {name} is {value}, expected 1 or more")


def _check_length(name: str, length: int, limit: int | None) -> None:
    if limit and length > limit:
        raise SurgeryError(
            f"{name}: prompt and new tokens make {length} positions, its limit is {limit}; lower --prompt or "
            "--new-tokens"
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


def bench_table(bench: Bench) -> Table:
    """The figures as a rich table: a row a quantity, medians with [quartiles]; under it what the speedup is of."""
    from rich.table import Table

    decoded = f", {bench.new_tokens} new tokens" if bench.new_tokens else ""
    title = f"batch {bench.batch}, prompt {bench.prompt}{decoded}, {bench.rounds} rounds"
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


PAIRED = (
    "speedup: the parent's seconds / the model's in the same round, median [quartiles] of these ratios; on a machine "
    "whose speed changes it need not be the ratio of the two medians beside it"
)


def _doubt(name: str, speedup: Speedup, rounds: int) -> str:
    """Why a speedup does not tell which model is faster."""
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
