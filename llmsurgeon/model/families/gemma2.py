"""Gemma 2: norms before and behind attention and FFN, gains of 1 + weight, softcaps, every other layer sliding."""

from dataclasses import replace

from llmsurgeon.model.families.llama import LLAMA

GEMMA2 = replace(
    LLAMA,
    model_type="gemma2",
    model_class="Gemma2ForCausalLM",
    ffn_norm="pre_feedforward_layernorm",
    attention_post_norm="post_attention_layernorm",
    ffn_post_norm="post_feedforward_layernorm",
    refused=(("use_bidirectional_attention", True, "its tokens see those behind them, as in an encoder"),),
    examples=("google/gemma-2-2b-it", "google/gemma-2-27b"),
)
