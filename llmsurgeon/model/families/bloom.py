"""BLOOM: LayerNorm, FFN four times as wide as the model, fused QKV, distances in place of positions (alibi)."""

from llmsurgeon.model.families.base import Family

BLOOM = Family(
    model_type="bloom",
    model_class="BloomForCausalLM",
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
    layers_key="n_layer",
    heads_key="n_head",
    kv_heads_key=None,
    width_key=None,
    per_layer_lists=(),
    refused=(
        (
            "apply_residual_connection_post_layernorm",
            True,
            "its stream passes through the norms of every block, so that no part can go without them",
        ),
    ),
    unsupported=(("fff", "its FFN adds the residual itself and has an activation that no config names"),),
    examples=("bigscience/bloom-560m", "bigscience/bloom"),
)
