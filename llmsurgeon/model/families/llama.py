"""Llama, and every family that shares its tensor names."""

from llmsurgeon.model.families.base import Family

LLAMA = Family(
    model_type="llama",
    model_class="LlamaForCausalLM",
    layers="model.layers",
    embedding="model.embed_tokens",
    final_norm="model.norm",
    attention="self_attn",
    attention_norm="input_layernorm",
    attention_out="o_proj",
    kv=("k_proj", "v_proj"),
    queries="q_proj",
    ffn="mlp",
    ffn_norm="post_attention_layernorm",
    ffn_in=("gate_proj", "up_proj"),
    ffn_out="down_proj",
    own_head_dim="declared",
    examples=("HuggingFaceTB/SmolLM2-135M-Instruct", "meta-llama/Llama-3.1-405B-Instruct"),
)
