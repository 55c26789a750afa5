"""A process that loads a model, says so, and then answers requests, one a line, until there are no more."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

Answer = Callable[[Any], dict[str, Any]]


def answer_all(
    load: Callable[[], tuple[dict[str, Any], Answer]], told: type[Exception] | tuple[type[Exception], ...]
) -> None:
    """Say on stdout what `load` says of the model, and then what its function answers to each line of stdin.

    An error among `told` is said as {"error": its text}, and is the last thing that is said.
    """
    # Ctrl-C, which a terminal sends to all, is the parent's; it ends this by closing the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer

    def say(found: dict[str, Any]) -> None:
        lines.write(json.dumps(found) + "\n")
        lines.flush()

    try:
        said, answer = load()
        say(said)
        for line in sys.stdin:
            say(answer(json.loads(line)))
    except told as error:
        say({"error": str(error) or type(error).__name__})
