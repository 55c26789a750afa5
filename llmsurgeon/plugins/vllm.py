"""vLLM's entry point: with llmsurgeon installed, vLLM loads its checkpoints without trust_remote_code.

Of nemotron-nas vLLM knows the model (DeciLMForCausalLM), and lacks the class that reads the config. Llamas in the
surgeon form it learns whole. vLLM calls `register` in each of its processes, before a model is asked for.
"""

from __future__ import annotations

import logging
from importlib import import_module

# Releases that scripts/engines was run with.
TESTED = ("0.32",)


def register() -> None:
    """Make transformers read config.json of our forms as our checkpoints' own classes do, and vLLM run Llamas."""
    from transformers import AutoConfig
    from vllm import ModelRegistry, __version__

    if not __version__.startswith(tuple(f"{release}." for release in TESTED)):
        logging.getLogger("llmsurgeon").warning(
            "llmsurgeon's plugin was tested with vLLM %s, and this is %s", " and ".join(TESTED), __version__
        )
    nas = import_module("llmsurgeon.modeling.configuration_decilm").DeciLMConfig
    AutoConfig.register(nas.model_type, nas, exist_ok=True)
    llama = import_module("llmsurgeon.plugins.vllm_config").SurgeonLlamaConfig
    AutoConfig.register(llama.model_type, llama, exist_ok=True)
    # By name: vLLM imports it in a process of its own where it looks at it.
    ModelRegistry.register_model("SurgeonLlamaForCausalLM", "llmsurgeon.plugins.vllm_llama:SurgeonLlamaForCausalLM")
