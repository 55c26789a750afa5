"""vLLM's entry point: with llmsurgeon installed, vLLM loads nemotron-nas checkpoints without trust_remote_code.

vLLM knows the model (DeciLMForCausalLM) and calls `register` in each of its processes; what it lacks is the class
that reads the config.
"""

from __future__ import annotations

from importlib import import_module


def register() -> None:
    """Make transformers read a config.json of model_type nemotron-nas with the class that our checkpoints ship."""
    from transformers import AutoConfig

    config_class = import_module("llmsurgeon.modeling.configuration_decilm").DeciLMConfig
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
