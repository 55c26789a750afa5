"""Mistral: Llama's tensors, one sliding window for all layers."""

from dataclasses import replace

from llmsurgeon.model.families.llama import LLAMA

MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    model_class="MistralForCausalLM",
    examples=("mistralai/Mistral-7B-Instruct-v0.3", "mistralai/Mistral-Large-Instruct-2407"),
)
