"""llama.cpp as an engine, at one of the types that GGUF files are written in here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

import torch

from llmsurgeon.checkpoint.passing import passing
from llmsurgeon.checkpoint.shards import meta_weights
from llmsurgeon.checkpoint.transform import TransformedWeights
from llmsurgeon.errors import SurgeryError
from llmsurgeon.evaluation.llamacpp import LlamaCpp, benchmark_llamacpp, require_xllamacpp
from llmsurgeon.evaluation.speed import Bench
from llmsurgeon.export import export_gguf
from llmsurgeon.formats.gguf.kinds import TERNARY, TYPES, chosen_kinds, known_type
from llmsurgeon.formats.gguf.model import lay_out, misfit
from llmsurgeon.model.spec import ModelSpec
from llmsurgeon.searching.costs.engines.base import Kind, Setting
from llmsurgeon.searching.costs.engines.random_weights import write_random_gguf
from llmsurgeon.searching.costs.shapes import Described, Shapes


class LlamaCppKind(Kind):
    """llama.cpp on the CPU, one sequence at a time; keys and values are float16."""

    name: ClassVar[str] = "llama.cpp"

    def type_of(self, text: str) -> str | None:
        kind = known_type(text or "F16")
        if kind in TERNARY:
            known = ", ".join(each.lower() for each in TYPES if each not in TERNARY)
            raise SurgeryError(f"--engine llama.cpp:{text}: it is for ternary weights alone; expected one of {known}")
        return kind

    def check(self, setting: Setting) -> None:
        if setting.batch != 1 or setting.device != "cpu":
            raise SurgeryError("--engine llama.cpp runs one sequence on the CPU; leave out --batch and --device")

    def require(self) -> None:
        require_xllamacpp()

    def version(self) -> str:
        return f"xllamacpp {version('xllamacpp')}"

    def grain(self, setting: Setting) -> int:
        return 32  # numbers of a block that share a scale

    def weight_bytes(self, model: Described, setting: Setting) -> int:
        assert setting.type
        meta = {name: torch.empty(shape, device="meta") for name, shape in model.shapes.items()}
        layout = lay_out(model.source, model.family, model.spec, meta)
        tensors = TransformedWeights(meta, layout.transforms)
        shapes = meta_weights(tensors)
        return sum(chosen_kinds(tensors, shapes, known_type(setting.type), None).sizes(shapes).values())

    def kv_number_bytes(self, model: Described, setting: Setting) -> int:
        return 2

    def misfit(self, shapes: Shapes, spec: ModelSpec) -> str | None:
        return misfit(spec, shapes.parent.family, shapes.parent.config)

    @contextmanager
    def timed(self, model: Described, setting: Setting, steps: int) -> Iterator[Callable[[], float]]:
        assert setting.type
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(model.spec.vocab, (setting.context,), generator=generator).tolist()
        with passing() as folder:
            write_random_gguf(folder / "model.gguf", model, setting.type)
            context = setting.context + steps + 1
            with LlamaCpp(folder / "model.gguf", context=context, threads=setting.threads) as engine:

                def run() -> float:
                    if not steps:
                        return engine.time(ids, 1).prefill
                    return engine.time(ids, steps, again=True).decode / steps

                yield run

    def bench(self, model: Path, parent: Path, setting: Setting, rounds: int) -> Bench:
        assert setting.type
        with passing() as folder:
            # Whatever types they are stored in, both are timed in this one.
            files = [
                export_gguf(path, folder / name, type=setting.type).path
                for path, name in ((model, "model.gguf"), (parent, "parent.gguf"))
            ]
            return benchmark_llamacpp(*files, prompt=setting.context, rounds=rounds, threads=setting.threads)
