"""GPT-NeoX and Pythia: LayerNorm, non-gated FFN, fused QKV, attention and FFN in parallel by default."""

from llmsurgeon.model.families.base import Family

GPT_NEOX = Family(
    model_type="gpt_neox",
    model_class="GPTNeoXForCausalLM",
    layers="gpt_neox.layers",
    embedding="gpt_neox.embed_in",
    final_norm="gpt_neox.final_layer_norm",
    attention="attention",
    attention_norm="input_layernorm",
    attention_out="dense",
    ffn="mlp",
    ffn_norm="post_attention_layernorm",
    ffn_in=("dense_h_to_4h",),
    ffn_out="dense_4h_to_h",
    norm="layer",
    parallel_residual_key="use_parallel_residual",
    kv_heads_key=None,
    per_layer_lists=(),
    old_rope=(("rotary_emb_base", "rope_theta"), ("rotary_pct", "partial_rotary_factor")),
    ignored=(r"rotary_emb\.inv_freq$", r"\.attention\.(masked_)?bias$"),
    legacy_names=(("embed_out.weight", "lm_head.weight"),),
    examples=("EleutherAI/pythia-160m", "EleutherAI/gpt-neox-20b"),
)
