"""Gemma 3, text only: Gemma 2 with a norm on each head's queries and keys, and rotary bases by kind of layer."""

from dataclasses import replace

from llmsurgeon.model.families.gemma2 import GEMMA2

GEMMA3_TEXT = replace(
    GEMMA2,
    model_type="gemma3_text",
    model_class="Gemma3ForCausalLM",
    layer_rules=("sliding_window_pattern", "_sliding_window_pattern"),
    old_rope=(("rope_theta", "full_attention.rope_theta"), ("rope_local_base_freq", "sliding_attention.rope_theta")),
    examples=("google/gemma-3-270m-it", "google/gemma-3-1b-it"),
)
