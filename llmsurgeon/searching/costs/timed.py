"""Timings of random-weight models, kept on disk by everything that they depend on."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from llmsurgeon.checkpoint.kept import cache_folder, keep, kept
from llmsurgeon.engines import Engine
from llmsurgeon.engines.shapes import Shapes
from llmsurgeon.errors import SurgeryError
from llmsurgeon.model.spec import ModelSpec
from llmsurgeon.processes.first import from_first
from llmsurgeon.progress import Progress
from llmsurgeon.searching.costs.meter import shape_of
from llmsurgeon.searching.costs.timing import PRECISION, Ratio, time_in_turn

# Of a decode: few, so that what else runs for a moment spoils one round of many.
STEPS = 8
MOST_ROUNDS = {"decode": 80, "prefill": 25}
AT_ONCE = 4  # models beside the base
FEWEST_TIMED = 8  # models among which time is shared out at least: whole ones follow, one at a time
MOST_IN_MEMORY = 4_000_000_000  # bytes of their weights


class Timings:
    """Ratios of models' seconds to those of one base, in one engine, timed where no earlier run has kept them.

    quantity: "decode", seconds of one step, or "prefill", seconds of one prompt.
    seconds: what all may take, about, of which a single one has a part; None as long as ratios are not known well.
    """

    def __init__(self, shapes: Shapes, engine: Engine, base: ModelSpec, quantity: str) -> None:
        self.shapes, self.engine, self.base, self.quantity = shapes, engine, base, quantity
        self._known: dict[ModelSpec, Ratio] = {}
        self.seconds: float | None = None

    def missing(self, specs: list[ModelSpec]) -> list[ModelSpec]:
        """Those that must be timed."""
        return [spec for spec in specs if self._look_up(spec) is None]

    def of(self, specs: list[ModelSpec]) -> dict[ModelSpec, Ratio]:
        """The ratio of each, as the first process times it: the others would only be in its way."""
        self._known = from_first(lambda: self._found(specs))
        return {spec: self._known[spec] for spec in specs}

    def _found(self, specs: list[ModelSpec]) -> dict[ModelSpec, Ratio]:
        missing = self.missing(specs)
        if missing:
            self.engine.kind.require()
            with Progress(f"time {self.quantity}", len(missing), "models") as progress:
                each = math.inf if self.seconds is None else self.seconds / max(len(missing), FEWEST_TIMED)
                for group in self._groups(missing):
                    self._time(group, each * len(group))
                    progress.advance(len(group))
        return self._known

    @property
    def known(self) -> dict[ModelSpec, Ratio]:
        """All that were asked for."""
        return dict(self._known)

    def _groups(self, specs: list[ModelSpec]) -> list[list[ModelSpec]]:
        weight = max(self.engine.weight_bytes(self.shapes.of(spec)) for spec in (self.base, *specs))
        size = max(1, min(AT_ONCE, MOST_IN_MEMORY // weight - 1))
        return [specs[start : start + size] for start in range(0, len(specs), size)]

    def _time(self, specs: list[ModelSpec], seconds: float) -> None:
        kind, setting, decode = self.engine.kind, self.engine.setting, self.quantity == "decode"
        with ExitStack() as stack:
            runs = [
                stack.enter_context(kind.timed(self.shapes.of(spec), setting, STEPS if decode else 0))
                for spec in (self.base, *specs)
            ]
            found = time_in_turn(runs[0], runs[1:], MOST_ROUNDS[self.quantity], seconds)
        for spec, ratio in zip(specs, found, strict=True):
            self._known[spec] = ratio
            self._keep(self._path(spec), ratio)

    def _look_up(self, spec: ModelSpec) -> Ratio | None:
        if spec not in self._known and (found := _read(self._path(spec))):
            # What was cut short is timed anew where there is time.
            short = found.rounds < MOST_ROUNDS[self.quantity] and found.half > PRECISION * found.value
            if self.seconds is not None or not short:
                self._known[spec] = found
        return self._known.get(spec)

    @staticmethod
    def _keep(path: Path | None, ratio: Ratio) -> None:
        """A cache that cannot be written only costs time."""
        if path is None:
            return
        with suppress(OSError, SurgeryError):
            path.parent.mkdir(parents=True, exist_ok=True)
            keep(path, lambda partial: partial.write_text(json.dumps(asdict(ratio))))

    def _path(self, spec: ModelSpec) -> Path | None:
        kind, setting = self.engine.kind, self.engine.setting
        setting = replace(setting, type=kind.type_in(self.shapes.of(self.base), setting))
        key = {
            "engine": [kind.name, kind.version(), asdict(setting)],
            "machine": machine(self.engine.setting.device),
            "quantity": [self.quantity, STEPS],
            "config": _essence(self.shapes.parent.config),
            "base": _essence_of(self.base),
            "model": _essence_of(spec),
        }
        with suppress(SurgeryError):
            return cache_folder("costs") / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.json"
        return None


def machine(device: str) -> list[Any]:
    """What of this machine speed depends on: processor, cores that may be used, threads of torch, the device's name."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        return [platform.machine(), processor, _cores(), torch.get_num_threads(), _device_name(device)]
    return [platform.machine(), platform.processor(), _cores(), torch.get_num_threads(), _device_name(device)]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device


def _read(path: Path | None) -> Ratio | None:
    if path is None:
        return None
    with suppress(OSError, ValueError, TypeError):
        if kept(path):
            found = Ratio(**json.loads(path.read_text()))
            if all(isinstance(value, int | float) and math.isfinite(value) for value in asdict(found).values()):
                return found
    return None


def _essence(config: Any) -> str:
    """What of a config a model's time can depend on: numbers of tokens, names and lists of layers aside."""
    kept_keys = {key: value for key, value in config.items() if not key.endswith(("_token_id", "_name_or_path"))}
    return json.dumps(kept_keys, sort_keys=True, default=str)


def _essence_of(spec: ModelSpec) -> str:
    return repr(spec.with_layers([shape_of(layer) for layer in spec.layers]))
