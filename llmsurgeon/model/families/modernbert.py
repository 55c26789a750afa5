"""ModernBERT: norms before the parts, gate and up stacked in one matrix, windows in two layers of three."""

from llmsurgeon.model.families.base import Family

MODERNBERT = Family(
    model_type="modernbert",
    model_class="ModernBertModel",
    layers="layers",
    embedding="embeddings.tok_embeddings",
    final_norm="final_norm",
    attention="attn",
    attention_norm="attn_norm",
    attention_out="Wo",
    ffn="mlp",
    ffn_norm="mlp_norm",
    ffn_in=("Wi",),
    ffn_stacked=2,
    ffn_out="Wo",
    head="decoder",
    norm="layer",
    first_stays="it alone has no norm before its attention, since the embeddings are normed already",
    encoder=True,
    kv_heads_key=None,
    window_key="local_attention",
    full_every_key="global_attn_every_n_layers",
    old_rope=(
        ("global_rope_theta", "full_attention.rope_theta"),
        ("local_rope_theta", "sliding_attention.rope_theta"),
    ),
    heads=(
        ("ModernBertModel", "AutoModel"),
        ("ModernBertForMaskedLM", "AutoModelForMaskedLM"),
        ("ModernBertForSequenceClassification", "AutoModelForSequenceClassification"),
        ("ModernBertForTokenClassification", "AutoModelForTokenClassification"),
        ("ModernBertForQuestionAnswering", "AutoModelForQuestionAnswering"),
        ("ModernBertForMultipleChoice", "AutoModelForMultipleChoice"),
    ),
    prefix="model.",
    examples=("answerdotai/ModernBERT-base", "nomic-ai/modernbert-embed-base"),
)
