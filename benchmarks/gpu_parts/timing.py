"""How the parts time: CUDA events around CUDA graphs, medians, quartiles; on a CPU the wall clock, for a dry run."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmsurgeon.evaluation.graphs import captured as recorded


@dataclass(frozen=True)
class Setting:
    """What a part is told.

    dry: tiny shapes on the CPU. quick: fewer sizes. model, texts, minutes, together: of healing.
    """

    dry: bool
    quick: bool = False
    model: str | None = None
    texts: tuple[str, ...] = ()
    minutes: float | None = None
    together: bool = False

    @property
    def device(self) -> torch.device:
        """Where it computes.

        Raises:
            SystemExit: there is no card, and it is no dry run.
        """
        if self.dry:
            return torch.device("cpu")
        if not torch.cuda.is_available():
            raise SystemExit("no CUDA device: --dry-run runs every line on a CPU, without figures")
        return torch.device("cuda")

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return torch.float32 if self.dry else torch.bfloat16


def captured(function: Callable[[], Any], device: torch.device) -> tuple[Callable[[], Any], str | None]:
    """(what replays `function` as one CUDA graph, None), or (`function`, why there is no graph).

    Everything it reads and writes must stay where it is.
    """
    if device.type != "cuda":
        return function, "not on a card"
    try:
        return recorded(function), None
    except Exception as error:  # what cannot be captured is timed as it is, and says why
        torch.cuda.synchronize()
        return function, f"{type(error).__name__}: {str(error)[:200]}"


def seconds_of(function: Callable[[], Any], device: torch.device) -> float:
    """One call, by the device's own clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    function()
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event) / 1000


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median and quartiles in microseconds, and of how many."""
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [*seconds] * 3
    return {"us": 1e6 * middle, "us_low": 1e6 * low, "us_high": 1e6 * high, "runs": len(seconds)}


def in_turn(
    ways: Mapping[str, Callable[[], Any]], device: torch.device, seconds: float = 1.5, graphs: bool = True
) -> dict[str, dict[str, Any]]:
    """Each way's spread, the ways in turn until the time is over (at least five rounds, on a CPU one).

    Short calls are repeated within a round, or the clock's own steps would be what is measured.
    """
    ready: dict[str, tuple[Callable[[], Any], str | None]] = {}
    for name, way in ways.items():
        ready[name] = captured(way, device) if graphs else (way, "not asked for")
        ready[name][0]()
    taken: dict[str, list[float]] = {name: [] for name in ways}
    first = {name: seconds_of(way, device) for name, (way, _) in ready.items()}
    repeats = {name: max(1, min(50, int(2e-4 / max(each, 1e-9)))) for name, each in first.items()}
    rounds, end = 0, time.monotonic() + seconds
    while rounds < 1 if device.type != "cuda" else rounds < 5 or time.monotonic() < end:
        rounds += 1
        for name, (way, _) in ready.items():
            count = repeats[name] if device.type == "cuda" else 1
            taken[name].append(seconds_of(lambda way=way, count=count: [way() for _ in range(count)], device) / count)
    return {
        name: {**spread(each), "graph": ready[name][1] is None, "why": ready[name][1]} for name, each in taken.items()
    }


def rotated(function: Callable[[int], Any], copies: int) -> Callable[[], Any]:
    """`function` on one of several sets of weights after the other, so that no cache holds what it reads."""

    def every() -> None:
        for number in range(copies):
            function(number)

    return every


def per_copy(time: dict[str, Any], copies: int) -> dict[str, Any]:
    """The spread of one of so many calls that were timed together."""
    return time | {key: time[key] / copies for key in ("us", "us_low", "us_high")}


def copies_of(nbytes: int, device: torch.device) -> int:
    """How many sets of weights of this size are more than a card's cache holds."""
    return 1 if device.type != "cuda" else max(2, min(64, -(-400_000_000 // max(nbytes, 1))))


def peak(function: Callable[[], Any], device: torch.device) -> int | None:
    """The most bytes that the allocator held during a call, all that was there before included; None on a CPU."""
    if device.type != "cuda":
        function()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def freed() -> None:
    """Give back what the last size held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
