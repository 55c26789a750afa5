"""Being asked to stop: SIGTERM and Ctrl-C, handled for a while."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


def as_before(number: int, before: dict[int, Any]) -> None:
    """From now on the signal does what it did before."""
    signal.signal(number, before[number])


@contextmanager
def on_stop(handle: Callable[[int, dict[int, Any]], None]) -> Iterator[None]:
    """SIGTERM and Ctrl-C call `handle` with their number and what was called before; outside the main thread nothing
    changes, as signals are somebody else's there."""
    before: dict[int, Any] = {}

    def received(number: int, frame: Any) -> None:
        handle(int(number), before)

    with suppress(ValueError):
        for number in (int(signal.SIGTERM), int(signal.SIGINT)):
            before[number] = signal.signal(number, received)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
