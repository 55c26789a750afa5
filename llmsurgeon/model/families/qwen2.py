"""Qwen2 and Qwen2.5: Llama's tensors, biases on q, k and v, sliding windows in the upper layers."""

from dataclasses import replace

from llmsurgeon.model.families.llama import LLAMA

QWEN2 = replace(
    LLAMA,
    own_head_dim="read",
    model_type="qwen2",
    model_class="Qwen2ForCausalLM",
    biased_qkv=True,
    examples=("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-72B-Instruct"),
)
