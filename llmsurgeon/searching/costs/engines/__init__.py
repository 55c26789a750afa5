"""What runs a model that was searched, what a type of it weighs, what it cannot hold, and how fast it is.

An engine is a row of `ENGINES`: `transformers` on a device, `llama.cpp` at a type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from llmsurgeon.boundary.foreign import shortened
from llmsurgeon.boundary.limits import LONGEST_SEQUENCE, MOST_SEQUENCES, check_threads
from llmsurgeon.errors import SurgeryError
from llmsurgeon.model.spec import LayerSpec
from llmsurgeon.searching.costs.engines.base import Kind, Setting
from llmsurgeon.searching.costs.engines.llamacpp import LlamaCppKind
from llmsurgeon.searching.costs.engines.transformers import TransformersKind
from llmsurgeon.searching.costs.shapes import Described, Shapes

ENGINES: Mapping[str, Kind] = {"transformers": TransformersKind(), "llama.cpp": LlamaCppKind()}


@dataclass(frozen=True)
class Engine:
    """An engine at a setting. `written` is what it was asked for as, `named` whether it was asked for at all."""

    kind: Kind
    setting: Setting
    written: str
    named: bool = field(default=True, compare=False)

    @classmethod
    def parse(cls, text: str | None, *, batch: int = 1, context: int = 512, **how: object) -> Engine:
        """Read `transformers`, `transformers:bf16`, `llama.cpp:q8_0` ...; None is transformers at the model's dtype.

        how: `threads`, of the CPU; `device`, of transformers.

        Raises:
            SurgeryError: no such engine or type, or a batch, context, device or number of threads that it cannot have.
        """
        name, _, type_ = (text or "transformers").partition(":")
        if name not in ENGINES:
            raise SurgeryError(
                f"--engine {shortened(text)}: expected one of {', '.join(ENGINES)}, such as llama.cpp:q8_0"
            )
        for what, value, most in (("batch", batch, MOST_SEQUENCES), ("context", context, LONGEST_SEQUENCE)):
            if not 1 <= value <= most:
                raise SurgeryError(f"--{what} {value}: expected 1 to {most:,}")
        kind = ENGINES[name]
        setting = Setting(kind.type_of(type_), batch, context, **how)  # type: ignore[arg-type]
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

    def kv_bytes(self, model: Described) -> int:
        """Bytes of keys and values, and of states, of a whole batch at the context that is asked for."""
        context, batch = self.setting.context, self.setting.batch
        attentions = model.spec.attentions
        numbers = sum(each.kv_width * min(context, each.window or context) for each in attentions)
        return batch * (numbers + model.spec.state_numbers()) * self.kind.kv_number_bytes(model, self.setting)


__all__ = ["ENGINES", "Described", "Engine", "Kind", "Setting"]
