"""The configs of models in the surgeon form, as vLLM reads them: entries of block_configs by attribute."""

from __future__ import annotations

from functools import cache
from typing import Any

from llmsurgeon.plugins.vllm_families import FAMILIES, Family


class Entry(dict[str, Any]):
    """A dict that is also read by attribute; a key that is not there is None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = self.get(name)
        return Entry(value) if isinstance(value, dict) else value


@cache
def config_class(family: Family) -> Any:
    """The checkpoint's own class, with entries that vLLM can ask for `entry.attention.no_op`."""
    shipped: Any = getattr(family.shipped(), family.config)

    def from_dict(cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config, and what is left of the arguments where that is asked for."""
        made = super(ours, cls).from_dict(config_dict, **kwargs)
        config = made[0] if isinstance(made, tuple) else made
        config.block_configs = [Entry(entry) for entry in config.block_configs or []]
        return made

    members = {"model_type": family.model_type, "from_dict": classmethod(from_dict), "__module__": __name__}
    ours: Any = type(family.config, (shipped,), members)
    ours._auto_class = None
    return ours


def __getattr__(name: str) -> Any:
    """A class by its name: vLLM sends configs from process to process, which find their class so."""
    for family in FAMILIES:
        if name == family.config:
            return config_class(family)
    raise AttributeError(name)
