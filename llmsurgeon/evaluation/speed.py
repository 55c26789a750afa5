"""How fast a model is: the figures of one and of a pair, from seconds that were taken in turn, whatever the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import comb
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from llmsurgeon.errors import SurgeryError
from llmsurgeon.progress import Progress

PROMPT, NEW_TOKENS = 512, 64
# Fewer pairs do not tell a speedup from noise: with five, all of them on one side of 1 have a chance of 1 in 16.
FEWEST_ROUNDS = 5


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
    graph: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dicts, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Round:
    prefill: float
    decode: float | None
    prompt_cache_bytes: int
    cache_bytes: int
    peak_bytes: int | None


def in_turn(runs: Sequence[Callable[[], Round]], rounds: int) -> list[list[Round]]:
    """The rounds of each, A B A B ..., after one untimed round of each."""
    timed: list[list[Round]] = [[] for _ in runs]
    with Progress("bench", (rounds + 1) * len(runs), "rounds") as progress:
        for number in range(rounds + 1):
            for run, kept in zip(runs, timed, strict=True):
                result = run()
                if number > 0:
                    kept.append(result)
                progress.advance()
    return timed


def bench_of(speeds: list[Speed], timed: list[list[Round]], **how: Any) -> Bench:
    """The parent's figures, if there is one, come first."""
    pairs = list(zip(*timed, strict=True)) if len(timed) > 1 else []
    return Bench(
        model=speeds[-1],
        parent=speeds[0] if pairs else None,
        prefill_speedup=Speedup.of([p.prefill / m.prefill for p, m in pairs]) if pairs else None,
        decode_speedup=_ratios([p.decode for p, _ in pairs], [m.decode for _, m in pairs]),
        **how,
    )


def speed_of(weights: int, rounds: list[Round], tokens: int, batch: int, new_tokens: int) -> Speed:
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


@dataclass(frozen=True)
class Timed:
    """A model that is to be timed, as far as it says what it can read."""

    name: str
    vocab: int
    positions: int | None
    encoder: bool = False


@dataclass(frozen=True)
class Task:
    """What every model of a bench does in a round: read ids [B, T], and decode so many tokens."""

    ids: Tensor
    new_tokens: int

    @classmethod
    def of(
        cls, models: Sequence[Timed], *, batch: int, prompt: int | None, new_tokens: int | None, rounds: int
    ) -> Task:
        """Of `prompt` random tokens that all models know; lengths that are left out as in `lengths`.

        Raises:
            SurgeryError: models that do different work, sizes below one or beyond a model's positions.
        """
        encoder = models[0].encoder
        if any(each.encoder != encoder for each in models):
            raise SurgeryError("bench: one of the models is an encoder and the other a decoder; they do different work")
        prompt, new_tokens = lengths(prompt, 0 if encoder else new_tokens, [each.positions for each in models])
        check_sizes(dict(batch=batch, prompt=prompt, rounds=rounds) | ({} if encoder else {"new_tokens": new_tokens}))
        for each in models:
            check_length(each.name, prompt + new_tokens, each.positions)
        made = torch.Generator().manual_seed(0)
        return cls(torch.randint(min(each.vocab for each in models), (batch, prompt), generator=made), new_tokens)

    @property
    def prompt(self) -> int:
        """Tokens of each sequence."""
        return self.ids.shape[1]

    @property
    def sizes(self) -> dict[str, int]:
        """As `Bench` has them, but for the rounds."""
        return {"batch": len(self.ids), "prompt": self.prompt, "new_tokens": self.new_tokens}


def lengths(prompt: int | None, new_tokens: int | None, limits: Sequence[int | None]) -> tuple[int, int]:
    """The lengths that are given, and for those that are left out the defaults, lowered to the models' positions."""
    limit = min([each for each in limits if each], default=PROMPT + NEW_TOKENS)
    if new_tokens is None:
        new_tokens = min(NEW_TOKENS, max(1, limit // 4 if prompt is None else limit - prompt))
    return (max(1, min(PROMPT, limit - new_tokens)) if prompt is None else prompt), new_tokens


def check_sizes(sizes: dict[str, int]) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise SurgeryError(f"bench: {name} is {value}, expected 1 or more")


def check_length(name: str, length: int, limit: int | None) -> None:
    if limit and length > limit:
        raise SurgeryError(
            f"{name}: prompt and new tokens make {length} positions, its limit is {limit}; lower --prompt or "
            "--new-tokens"
        )
