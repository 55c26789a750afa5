"""llama.cpp as an engine, at one of the types that GGUF files are written in here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

import torch

from llmsurgeon.boundary.foreign import local_path
from llmsurgeon.checkpoint.passing import passing
from llmsurgeon.checkpoint.shards import meta_weights
from llmsurgeon.checkpoint.transform import TransformedWeights
from llmsurgeon.engines.base import Asked, Kind, Setting
from llmsurgeon.engines.random_weights import write_random_gguf
from llmsurgeon.engines.shapes import Described, Shapes
from llmsurgeon.errors import SurgeryError
from llmsurgeon.evaluation.apart import Apart
from llmsurgeon.evaluation.llama_server import require_xllamacpp
from llmsurgeon.evaluation.llamacpp import benchmark_llamacpp
from llmsurgeon.evaluation.speed import Bench
from llmsurgeon.export import export_gguf
from llmsurgeon.formats.gguf.kinds import TERNARY, TYPES, chosen_kinds, known_type
from llmsurgeon.formats.gguf.model import lay_out, misfit
from llmsurgeon.model.spec import ModelSpec
from llmsurgeon.planning.options import Options


class LlamaCppKind(Kind):
    """llama.cpp on the CPU, one sequence at a time; keys and values are float16."""

    name: ClassVar[str] = "llama.cpp"
    devices: ClassVar[bool] = False

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
        # How it is run is part of it: figures of several servers in one process are no longer believed.
        return f"xllamacpp {version('xllamacpp')}, a process each"

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
            with Apart(folder / "model.gguf", context=context, threads=setting.threads) as engine:

                def run() -> float:
                    if not steps:
                        return engine.time(ids, 1).prefill
                    return engine.time(ids, steps, again=True).decode / steps

                yield run

    def at(self, asked: Asked, setting: Setting) -> Asked:
        return replace(asked, type=setting.type, threads=setting.threads, anew=True)

    def bench(self, asked: Asked) -> Bench:
        if asked.batch != 1 or asked.device not in ("auto", "cpu") or asked.dtype or asked.graph:
            raise SurgeryError(
                "--engine llama.cpp times one sequence on the CPU; leave out --batch, --device, --dtype, --graph"
            )
        self.require()  # before anything is exported
        with passing() as folder:
            student = _as_gguf(asked, asked.model, folder / "model.gguf", asked.revision)
            parent = _as_gguf(asked, asked.against, folder / "parent.gguf") if asked.against else None
            return benchmark_llamacpp(student, parent, threads=asked.threads, **asked.sizes)


def _as_gguf(asked: Asked, name: str, target: Path, revision: str | None = None) -> Path:
    """The GGUF file of this name, or the one that a model in another form is exported to."""
    if name.endswith(".gguf") and local_path(name).is_file() and not asked.anew:
        return local_path(name)
    options = Options(trust_remote_code=asked.trust_remote_code)
    made = export_gguf(name, str(target), type=asked.type or "F16", options=options, revision=revision)
    for note in made.notes:
        asked.say(f"{name}: {note}")
    return made.path
