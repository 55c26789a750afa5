"""vLLM and OpenVINO as engines of `bench`, in the environments that have them."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from llmsurgeon.boundary.foreign import shortened
from llmsurgeon.engines.base import Asked, Benched
from llmsurgeon.errors import SurgeryError
from llmsurgeon.evaluation.elsewhere import Place, Served, benchmark_elsewhere
from llmsurgeon.evaluation.speed import Bench, Timed
from llmsurgeon.formats.loading import dtype_of
from llmsurgeon.planning.opened import OpenedCheckpoint, open_model


class _Elsewhere(Benched):
    """An engine in another environment. accepted: what --device may say."""

    elsewhere: ClassVar[bool] = True
    place: ClassVar[Place]
    accepted: ClassVar[tuple[str, ...]]

    @abstractmethod
    def how(self, asked: Asked) -> dict[str, Any]:
        """What its worker is told besides the model.

        Raises:
            SurgeryError: the engine has no such setting.
        """

    @abstractmethod
    def refusal(self, model: OpenedCheckpoint) -> str | None:
        """Why it cannot load this model, None where it can as far as can be told here."""

    def bench(self, asked: Asked) -> Bench:
        if asked.device not in self.accepted or asked.graph:
            raise SurgeryError(f"--engine {self.name} runs where its build does; leave out --device and --graph")
        dtype_of(asked.dtype)  # a word that is one
        how = {"threads": asked.threads, "dtype": asked.dtype, "trust_remote_code": asked.trust_remote_code}
        how |= self.how(asked)
        python = self.place.python(asked.engine_python)
        names = [asked.model] if asked.against is None else [asked.against, asked.model]
        revisions = [None] * (len(names) - 1) + [asked.revision]
        models = [self._served(*each, asked.trust_remote_code) for each in zip(names, revisions, strict=True)]
        return benchmark_elsewhere(self.place, python, models, batch=asked.batch, **asked.sizes, how=how)

    def _served(self, name: str, revision: str | None, trust_remote_code: bool) -> Served:
        model = open_model(name, revision, trust_remote_code)
        folder = model.checkpoint.path
        why = self.refusal(model) if folder.is_dir() else "a GGUF file; llmsurgeon export --to native makes a folder"
        if why:
            raise SurgeryError(f"{name}: --engine {self.name} cannot load it: {why}")
        weights = model.costs(model.spec, {each: tuple(tensor.shape) for each, tensor in model.meta().items()})
        return Served(
            Timed(name, model.spec.vocab, model.spec.max_positions, model.family.encoder),
            Path(folder).absolute(),
            0 if model.family.encoder else model.spec.kv_numbers_per_token(),
            weights.disk_bytes,
        )


class OpenVINO(_Elsewhere):
    """OpenVINO through optimum-intel's export and classes, which know models of the native form."""

    name: ClassVar[str] = "openvino"
    accepted: ClassVar[tuple[str, ...]] = ("auto", "cpu")
    place: ClassVar[Place] = Place("openvino", "optimum.intel", "openvino_worker.py", "optimum-intel[openvino]")
    TYPES: ClassVar[tuple[str, ...]] = ("int8", "int4")

    def how(self, asked: Asked) -> dict[str, Any]:
        if asked.type and asked.type not in self.TYPES:
            known = " or ".join(self.TYPES)
            raise SurgeryError(f"--type {shortened(asked.type)}: expected {known}, which --engine openvino rounds to")
        return {"type": asked.type}

    def refusal(self, model: OpenedCheckpoint) -> str | None:
        if model.tower:
            return f"its exporter takes text models here, and this one is vision-language ({model.model_type})"
        if model.model_type != model.family.model_type:
            return (
                f"its exporter knows models by their type, and {model.model_type} brings code of its own; where all "
                "blocks have one shape, llmsurgeon export --to native writes a model that it knows"
            )
        return None


class VLLM(_Elsewhere):
    """vLLM, whatever its build runs on."""

    name: ClassVar[str] = "vllm"
    accepted: ClassVar[tuple[str, ...]] = ("auto",)
    place: ClassVar[Place] = Place("vllm", "vllm", "vllm_worker.py", "vllm")

    def how(self, asked: Asked) -> dict[str, Any]:
        if asked.type:
            raise SurgeryError("--type is for --engine llama.cpp and openvino; for vllm there is --dtype")
        # Of a card's memory; a parent beside the model takes as much.
        return {"share": 0.45 if asked.against else 0.9}

    def refusal(self, model: OpenedCheckpoint) -> str | None:
        return "it generates text, and this is an encoder" if model.family.encoder else None
