"""transformers as an engine: any device, any part."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

import torch

from llmsurgeon.bench import bench
from llmsurgeon.boundary.foreign import shortened
from llmsurgeon.errors import SurgeryError
from llmsurgeon.evaluation.latency import prompt_read, timed_round, timed_steps
from llmsurgeon.evaluation.speed import Bench
from llmsurgeon.evaluation.threads import threads_of_torch
from llmsurgeon.formats.devices import chosen_device
from llmsurgeon.formats.models import filled_model
from llmsurgeon.model.spec import ModelSpec
from llmsurgeon.searching.costs.engines.base import Kind, Setting
from llmsurgeon.searching.costs.engines.random_weights import RandomWeights
from llmsurgeon.searching.costs.shapes import Described, Shapes

TYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


class TransformersKind(Kind):
    """transformers' own code and this tool's parts, on torch."""

    name: ClassVar[str] = "transformers"

    def type_of(self, text: str) -> str | None:
        if not text:
            return None
        if text not in TYPES and text not in TYPES.values():
            raise SurgeryError(f"--engine transformers:{shortened(text)}: expected one of {', '.join(TYPES)}")
        return TYPES.get(text, text)

    def check(self, setting: Setting) -> None:
        chosen_device(setting.device)

    def require(self) -> None:
        """It came with this tool."""

    def version(self) -> str:
        return f"transformers {version('transformers')}, torch {torch.__version__}, python {platform.python_version()}"

    def grain(self, setting: Setting) -> int:
        return 32

    def weight_bytes(self, model: Described, setting: Setting) -> int:
        return model.costs.parameters * self._dtype(model, setting).itemsize

    def kv_number_bytes(self, model: Described, setting: Setting) -> int:
        return self._dtype(model, setting).itemsize

    def misfit(self, shapes: Shapes, spec: ModelSpec) -> str | None:
        return None

    @contextmanager
    def timed(self, model: Described, setting: Setting, steps: int) -> Iterator[Callable[[], float]]:
        dtype = self._dtype(model, setting)
        made = filled_model(model.config, RandomWeights(model.shapes, dtype), dtype, setting.device)
        size = (setting.batch, setting.context)
        ids_BT = torch.randint(model.spec.vocab, size, generator=torch.Generator().manual_seed(0))

        with threads_of_torch(setting.threads):
            read = prompt_read(made, ids_BT) if steps else None

        def run() -> float:
            with threads_of_torch(setting.threads):
                return timed_steps(made, read, steps) / steps if read else timed_round(made, ids_BT, 0).prefill

        yield run

    def bench(self, model: Path, parent: Path, setting: Setting, rounds: int) -> Bench:
        return bench(
            model,
            parent,
            batch=setting.batch,
            prompt=setting.context,
            rounds=rounds,
            threads=setting.threads,
            device=setting.device,
            dtype=setting.type,
        )

    def _dtype(self, model: Described, setting: Setting) -> torch.dtype:
        if setting.type is None:
            return model.dtype
        found: torch.dtype = getattr(torch, setting.type)
        return found
