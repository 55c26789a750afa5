"""Granite 3: Llama's tensors; factors on embeddings, attention scores, residual contributions and logits."""

from dataclasses import replace

from llmsurgeon.model.families.llama import LLAMA

GRANITE = replace(
    LLAMA,
    own_head_dim="read",
    model_type="granite",
    model_class="GraniteForCausalLM",
    residual_multiplier_key="residual_multiplier",
    examples=("ibm-granite/granite-3.3-2b-instruct", "ibm-granite/granite-3.3-8b-instruct"),
)
