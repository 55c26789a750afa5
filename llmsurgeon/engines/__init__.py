"""What runs models: what a type of them weighs there, what cannot be held, and how fast they are.

An engine is a row of `ENGINES`: `transformers` on a device, `llama.cpp` at a type, others in an environment of their
own. `bench` looks it up here; so do searches, which measure in those that are a `Kind`. May import `planning` and
below, and `export`, which makes the files that some of them read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llmsurgeon.boundary.foreign import shortened
from llmsurgeon.boundary.limits import LONGEST_SEQUENCE, MOST_SEQUENCES, check_threads
from llmsurgeon.engines.base import Asked, Benched, Kind, Setting
from llmsurgeon.engines.elsewhere import VLLM, OpenVINO
from llmsurgeon.engines.llamacpp import LlamaCppKind
from llmsurgeon.engines.shapes import Described, Shapes
from llmsurgeon.engines.transformers import TransformersKind
from llmsurgeon.errors import SurgeryError
from llmsurgeon.evaluation.speed import Bench
from llmsurgeon.model.spec import LayerSpec

ENGINES: Mapping[str, Benched] = {each.name: each for each in (TransformersKind(), LlamaCppKind(), OpenVINO(), VLLM())}
SEARCHED: Mapping[str, Kind] = {name: each for name, each in ENGINES.items() if isinstance(each, Kind)}


@dataclass(frozen=True)
class Engine:
    """An engine at a setting. `written` is what it was asked for as, `named` whether it was asked for at all."""

    kind: Kind
    setting: Setting
    written: str
    named: bool = field(default=True, compare=False)

    @classmethod
    def parse(
        cls,
        text: str | None,
        *,
        batch: int = 1,
        context: int = 512,
        threads: int | None = None,
        device: str = "cpu",
    ) -> Engine:
        """Read `transformers`, `transformers:bf16`, `llama.cpp:q8_0` ...; None is transformers at the model's dtype.

        threads: of the CPU; device: where the model is to run, if it can run anywhere but on the CPU.

        Raises:
            SurgeryError: no such engine or type, or a batch, context, device or number of threads that it cannot have.
        """
        name, _, type_ = (text or "transformers").partition(":")
        if name not in SEARCHED:
            then = "; it is for bench alone" if name in ENGINES else ""
            raise SurgeryError(
                f"--engine {shortened(text)}: expected one of {', '.join(SEARCHED)}, such as llama.cpp:q8_0{then}"
            )
        for what, value, most in (("batch", batch, MOST_SEQUENCES), ("context", context, LONGEST_SEQUENCE)):
            if not 1 <= value <= most:
                raise SurgeryError(f"--{what} {value}: expected 1 to {most:,}")
        kind = SEARCHED[name]
        setting = Setting(kind.type_of(type_), batch, context, threads, device if kind.devices else "cpu")
        check_threads(setting.threads)
        kind.check(setting)
        return cls(kind, setting, text or name, text is not None)

    @property
    def grain(self) -> int:
        """Widths of FFNs that it runs well are multiples of it."""
        return self.kind.grain(self.setting)

    def misfit(self, shapes: Shapes, layer: LayerSpec, first: bool = False) -> str | None:
        """Why it cannot run a model that has such a layer (as its first one), None where it can."""
        return self.kind.misfit(shapes, shapes.parent.spec.with_layers([layer]) if first else shapes.beside_stem(layer))

    def weight_bytes(self, model: Described) -> int:
        """Bytes that the model's weights take in it."""
        return self.kind.weight_bytes(model, self.setting)

    def bench(self, model: Path, parent: Path, rounds: int) -> Bench:
        """Two written models, timed in turn at this setting, whatever types they are stored in."""
        asked = Asked(str(model), str(parent), {"prompt": self.setting.context, "new_tokens": None, "rounds": rounds})
        return self.kind.bench(self.kind.at(asked, self.setting))

    def kv_bytes(self, model: Described) -> int:
        """Bytes of keys and values, and of states, of a whole batch at the context that is asked for."""
        context, batch = self.setting.context, self.setting.batch
        attentions = model.spec.attentions
        numbers = sum(each.kv_width * min(context, each.window or context) for each in attentions)
        return batch * (numbers + model.spec.state_numbers()) * self.kind.kv_number_bytes(model, self.setting)


__all__ = ["ENGINES", "SEARCHED", "Asked", "Benched", "Described", "Engine", "Kind", "Setting"]
