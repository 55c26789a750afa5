"""Time and signals of a training: how long it takes, and whether it was asked to stop."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from llmsurgeon.errors import Stopped
from llmsurgeon.healing.distill.signals import as_before, on_stop
from llmsurgeon.healing.distill.training import State

if TYPE_CHECKING:
    from accelerate import Accelerator


class Clock:
    """The seconds of a run, what they were spent on, and the signal that asked it to stop (0: none did)."""

    def __init__(self, state: State, accelerator: Accelerator) -> None:
        self.state, self.accelerator = state, accelerator
        self.signal, self._zero = 0, 0.0

    def start(self) -> None:
        """The run goes on from the seconds that its state has."""
        self._zero = time.monotonic() - self.state.seconds

    def tick(self) -> None:
        """Look at the clock; where there are several processes all of them hear of each other's signals, and go by the
        main process's clock, so that they decide alike."""
        self.state.seconds = time.monotonic() - self._zero
        if self.accelerator.num_processes > 1:
            mine = torch.tensor([[self.signal, self.state.seconds]], device=self.accelerator.device)
            everyone: Tensor = self.accelerator.gather(mine)
            self.state.seconds, self.signal = everyone[0, 1].item(), int(everyone[:, 0].max().item())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is done inside counts as `name`."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.state.phases[name] = self.state.phases.get(name, 0.0) + time.monotonic() - start

    @contextmanager
    def signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C end the run after the step that they find it in."""

        def note(number: int, before: dict[int, Any]) -> None:
            self.signal = number
            as_before(number, before)  # a second one does what it always does

        with on_stop(note):
            yield

    def end(self, title: str) -> NoReturn:
        """Stop, as the signal that came asks; the state is saved."""
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise Stopped(
            f"{title}: stopped by SIGTERM at step {self.state.step}; its state is saved, and the same command started "
            "again goes on from there"
        )
