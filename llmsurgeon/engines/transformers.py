"""transformers as an engine: any device, any part."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from typing import ClassVar

import torch

from llmsurgeon.boundary.foreign import shortened
from llmsurgeon.engines.base import Asked, Kind, Setting
from llmsurgeon.engines.random_weights import RandomWeights
from llmsurgeon.engines.shapes import Described, Shapes
from llmsurgeon.errors import SurgeryError
from llmsurgeon.evaluation.latency import benchmark, prompt_read, timed_round, timed_steps
from llmsurgeon.evaluation.speed import Bench
from llmsurgeon.evaluation.threads import threads_of_torch
from llmsurgeon.formats.devices import chosen_device
from llmsurgeon.formats.dtypes import computed_in
from llmsurgeon.formats.loading import dtype_of, load_model
from llmsurgeon.formats.models import filled_model
from llmsurgeon.model.spec import ModelSpec

TYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


class TransformersKind(Kind):
    """transformers' own code and this tool's parts, on torch."""

    name: ClassVar[str] = "transformers"
    devices: ClassVar[bool] = True

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

    def type_in(self, model: Described, setting: Setting) -> str:
        return str(self._dtype(model, setting)).removeprefix("torch.")

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

    def at(self, asked: Asked, setting: Setting) -> Asked:
        return replace(asked, dtype=setting.type, batch=setting.batch, threads=setting.threads, device=setting.device)

    def bench(self, asked: Asked) -> Bench:
        if asked.type:
            raise SurgeryError("--type is for --engine llama.cpp; for transformers there is --dtype")
        dtype, device = dtype_of(asked.dtype), chosen_device(asked.device)
        with threads_of_torch(asked.threads):
            student = load_model(asked.model, dtype=dtype, device=device, revision=asked.revision)
            parent = load_model(asked.against, dtype=dtype, device=device) if asked.against else None
            return benchmark(student, parent, batch=asked.batch, graph=asked.graph, **asked.sizes)

    def _dtype(self, model: Described, setting: Setting) -> torch.dtype:
        asked: torch.dtype | None = getattr(torch, setting.type) if setting.type else None
        return computed_in(model.dtype, asked, setting.device)
