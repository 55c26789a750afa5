"""GPT-2: LayerNorm, non-gated FFN, Conv1D weights stored [in, out], learnt positions."""

from llmsurgeon.model.families.base import Family

GPT2 = Family(
    model_type="gpt2",
    model_class="GPT2LMHeadModel",
    layers="transformer.h",
    embedding="transformer.wte",
    final_norm="transformer.ln_f",
    attention="attn",
    attention_norm="ln_1",
    attention_out="c_proj",
    ffn="mlp",
    ffn_norm="ln_2",
    ffn_in=("c_fc",),
    ffn_out="c_proj",
    norm="layer",
    transposed=True,
    hidden_key="n_embd",
    layers_key="n_layer",
    heads_key="n_head",
    kv_heads_key=None,
    width_key="n_inner",
    positions_key="n_positions",
    per_layer_lists=(),
    ignored=(r"\.attn\.(masked_)?bias$",),
    refused=(
        ("scale_attn_by_inverse_layer_idx", True, "its attention scale depends on the layer's position"),
        ("add_cross_attention", True, "cross-attention has no part in a decoder-only model"),
    ),
    examples=("openai-community/gpt2", "distilbert/distilgpt2"),
)
