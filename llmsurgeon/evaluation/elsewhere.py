"""Engines that are installed in an environment of their own: checkpoints timed in turn, each in a process there.

vLLM and optimum-intel ask for a transformers older than this tool's, so the Python that has them is another one.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llmsurgeon.boundary.foreign import first_lines, shortened
from llmsurgeon.errors import SurgeryError
from llmsurgeon.evaluation.speed import Bench, Round, Task, Timed, bench_of, in_turn, speed_of
from llmsurgeon.evaluation.worker import Worker

WORKERS = Path(__file__).resolve().parents[1] / "workers"


@dataclass(frozen=True)
class Place:
    """An engine: what users call it, the package that has it, the file that runs there, how it is installed."""

    name: str
    package: str
    worker: str
    install: str

    def python(self, named: str | None) -> str:
        """The Python that has the engine: `named`, or this one.

        Raises:
            SurgeryError: none is named, and the engine is not installed here.
        """
        if named is not None:
            python = Path(named).expanduser()
            if not python.is_file() or not os.access(python, os.X_OK):
                raise SurgeryError(
                    f"--engine-python {shortened(named)}: no such program; name the Python of the environment that has "
                    f"{self.package}, such as {self.name}-env/bin/python"
                )
            return str(python.absolute())
        if find_spec(self.package.partition(".")[0]) is None or find_spec(self.package) is None:
            raise SurgeryError(
                f"--engine {self.name}: {self.package} is not installed here, and asks for a transformers older than "
                f"llmsurgeon's; make an environment of its own: python -m venv {self.name}-env; "
                f"{self.name}-env/bin/pip install {self.install}; then add --engine-python {self.name}-env/bin/python"
            )
        return sys.executable


@dataclass(frozen=True)
class Served:
    """A checkpoint that is to be timed. cache_numbers: keys and values that a token adds; weight_bytes: on the disk."""

    timed: Timed
    folder: Path
    cache_numbers: int
    weight_bytes: int


def benchmark_elsewhere(
    place: Place,
    python: str,
    models: Sequence[Served],
    *,
    batch: int = 1,
    prompt: int | None = None,
    new_tokens: int | None = None,
    rounds: int = 5,
    how: Mapping[str, Any],
) -> Bench:
    """As `latency.benchmark`, of a model (the last of `models`) and its parent in another environment's engine.

    how: what the worker is told besides: threads, dtype ...

    Raises:
        SurgeryError: sizes that do not fit, or what the engine says of a model.
    """
    timeds = [each.timed for each in models]
    task = Task.of(timeds, batch=batch, prompt=prompt, new_tokens=new_tokens, rounds=rounds)
    prompt, new_tokens, ids = task.prompt, task.new_tokens, task.ids.tolist()
    with ExitStack() as stack:

        def started(model: Served) -> Worker:
            asked = {**how, "folder": str(model.folder), "encoder": model.timed.encoder, "batch": batch}
            # One token more than is timed comes with the prefill.
            asked |= {"positions": min(prompt + new_tokens + 1, model.timed.positions or sys.maxsize)}
            command = [python, str(WORKERS / place.worker), json.dumps(asked)]
            what = f"{model.timed.name}: {place.name}"
            with _told(what, "cannot load it"):
                return stack.enter_context(Worker(command, _environment(how.get("threads")), what, quiet=True))

        workers = [started(model) for model in models]
        said = workers[-1].said

        def run(model: Served, worker: Worker) -> Round:
            with _told(worker.what, "failed"):
                found = worker.ask([ids, new_tokens])
            token = model.cache_numbers * worker.said["cache_number_bytes"] * batch
            decode = found["decode"] if new_tokens else None
            return Round(found["prefill"], decode, prompt * token, (prompt + new_tokens) * token, None)

        pairs = list(zip(models, workers, strict=True))
        timed = in_turn([partial(run, *pair) for pair in pairs], rounds)
    weights = [worker.said["weight_bytes"] or model.weight_bytes for model, worker in pairs]
    speeds = [
        speed_of(size, kept, batch * prompt, batch, new_tokens) for size, kept in zip(weights, timed, strict=True)
    ]
    computed = {key: said[key] for key in ("device", "dtype", "threads")}
    return bench_of(speeds, timed, **task.sizes, rounds=rounds, **computed, engine=place.name)


@contextmanager
def _told(what: str, how: str) -> Iterator[None]:
    """What an engine said of a model, in one line, and in our words where they help."""
    try:
        yield
    except SurgeryError as error:
        said = str(error)
        if said.startswith(what):
            raise
        if "trust_remote_code" in said:
            raise SurgeryError(
                f"{what} has no code for this form; install llmsurgeon beside it, whose plugin has, or pass "
                "--trust-remote-code to let the checkpoint's own run"
            ) from error
        raise SurgeryError(f"{what} {how}: {first_lines(error)}") from error


def _environment(threads: int | None) -> dict[str, str]:
    """This process's, without what would lead another Python to this one's packages; nothing is fetched."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    if threads:
        kept["OMP_NUM_THREADS"] = str(threads)
    return kept | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
