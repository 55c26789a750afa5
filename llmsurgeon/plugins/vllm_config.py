"""The config of a Llama in the surgeon form, as vLLM reads it: entries of block_configs by attribute."""

from __future__ import annotations

from importlib import import_module
from typing import Any

Shipped: Any = import_module("llmsurgeon.modeling.modeling_surgeon_llama").SurgeonLlamaConfig


class Entry(dict[str, Any]):
    """A dict that is also read by attribute; a key that is not there is None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = self.get(name)
        return Entry(value) if isinstance(value, dict) else value


class SurgeonLlamaConfig(Shipped):
    """As the checkpoint's own class, with entries that vLLM can ask for `entry.attention.no_op`."""

    model_type = "surgeon_llama"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config, and what is left of the arguments where that is asked for."""
        made = super().from_dict(config_dict, **kwargs)
        config = made[0] if isinstance(made, tuple) else made
        config.block_configs = [Entry(entry) for entry in config.block_configs or []]
        return made


SurgeonLlamaConfig._auto_class = None
