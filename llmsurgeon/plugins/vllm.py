"""vLLM's entry point: with llmsurgeon installed, vLLM loads its checkpoints without trust_remote_code.

Of nemotron-nas vLLM knows the model (DeciLMForCausalLM), and lacks the class that reads the config. The surgeon form of
families that it has layers for it learns whole, and of bitnet the packed linears. vLLM calls `register` in each of its
processes, before a model is asked for.
"""

from __future__ import annotations

import logging
from importlib import import_module

from llmsurgeon.plugins.vllm_families import FAMILIES

# Releases that scripts/engines was run with.
TESTED = ("0.32",)


def register() -> None:
    """Make transformers read config.json of our forms as our checkpoints' own classes do, and vLLM run the models."""
    from transformers import AutoConfig
    from vllm import ModelRegistry, __version__

    if not __version__.startswith(tuple(f"{release}." for release in TESTED)):
        logging.getLogger("llmsurgeon").warning(
            "llmsurgeon's plugin was tested with vLLM %s, and this is %s", " and ".join(TESTED), __version__
        )
    nas = import_module("llmsurgeon.modeling.configuration_decilm").DeciLMConfig
    AutoConfig.register(nas.model_type, nas, exist_ok=True)
    import_module("llmsurgeon.plugins.vllm_bitnet")  # registers itself
    config_class = import_module("llmsurgeon.plugins.vllm_config").config_class
    for family in FAMILIES:
        AutoConfig.register(family.model_type, config_class(family), exist_ok=True)
        # By name: vLLM imports it in a process of its own where it looks at it.
        ModelRegistry.register_model(family.architecture, f"llmsurgeon.plugins.vllm_models:{family.architecture}")
