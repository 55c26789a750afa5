"""Qwen3: Llama's tensors with a norm on each head's queries and keys."""

from dataclasses import replace

from llmsurgeon.model.families.llama import LLAMA

QWEN3 = replace(
    LLAMA,
    model_type="qwen3",
    model_class="Qwen3ForCausalLM",
    examples=("Qwen/Qwen3-0.6B", "Qwen/Qwen3-32B"),
)
