"""Falcon in its layouts: 7B (one norm, one key/value head), RW (in sequence, alibi), 40B and 11B (grouped heads)."""

from llmsurgeon.model.families.base import Family

GROUPED = {"kv_heads_key": "num_kv_heads", "fused_qkv": ("query_key_value", "by head")}
TWO_NORMS = {"shares_norm": False, "attention_norm": "ln_attn", "ffn_norm": "ln_mlp"}

FALCON = Family(
    model_type="falcon",
    model_class="FalconForCausalLM",
    layers="transformer.h",
    embedding="transformer.word_embeddings",
    final_norm="transformer.ln_f",
    attention="self_attention",
    attention_norm="input_layernorm",
    attention_out="dense",
    ffn="mlp",
    ffn_norm="post_attention_layernorm",
    ffn_in=("dense_h_to_4h",),
    ffn_out="dense_4h_to_h",
    norm="layer",
    shares_norm=True,
    parallel_residual_key="parallel_attn",
    kv_heads_key=None,
    fixed_kv_heads=1,
    width_key="ffn_hidden_size",
    per_layer_lists=(),
    layouts=(
        ({"parallel_attn": False}, {"shares_norm": False}),
        ({"multi_query": False}, {"fixed_kv_heads": None}),
        ({"new_decoder_architecture": True}, GROUPED),
        # The class sets what the config leaves open to 2.
        ({"new_decoder_architecture": True, "num_ln_in_parallel_attn": None}, TWO_NORMS),
        ({"new_decoder_architecture": True, "num_ln_in_parallel_attn": 2}, TWO_NORMS),
    ),
    examples=("tiiuae/falcon-7b-instruct", "tiiuae/falcon-40b", "tiiuae/falcon-rw-1b", "tiiuae/falcon-11B"),
)
