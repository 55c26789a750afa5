"""BERT: LayerNorm after each residual sum, a bias everywhere, learnt positions; one class for each task."""

from llmsurgeon.model.families.base import Family

# Refusals of every family whose norms follow the residual sums.
POST_NORM = (
    (
        "fuse_ffn",
        "its norms follow the residual sums: each FFN's output is normed together with its input, and a sum of normed "
        "vectors is no single FFN's output",
    ),
    (
        "parallel_blocks",
        "its norms follow the residual sums: what leaves a block is normed, and a sum of several such outputs is not",
    ),
)

DECODER_ONLY = "a causal or cross-attending BERT is no encoder"

BERT = Family(
    model_type="bert",
    model_class="BertModel",
    layers="encoder.layer",
    embedding="embeddings.word_embeddings",
    final_norm="",
    attention="attention",
    attention_norm="attention.output.LayerNorm",
    attention_out="output.dense",
    ffn="",
    ffn_norm="output.LayerNorm",
    ffn_in=("intermediate.dense",),
    ffn_out="output.dense",
    head="cls.predictions.decoder",
    norm="layer",
    post_norm=True,
    encoder=True,
    kv_heads_key=None,
    per_layer_lists=(),
    heads=(
        ("BertModel", "AutoModel"),
        ("BertForPreTraining", "AutoModelForPreTraining"),
        ("BertForMaskedLM", "AutoModelForMaskedLM"),
        ("BertForNextSentencePrediction", "AutoModelForNextSentencePrediction"),
        ("BertForSequenceClassification", "AutoModelForSequenceClassification"),
        ("BertForTokenClassification", "AutoModelForTokenClassification"),
        ("BertForQuestionAnswering", "AutoModelForQuestionAnswering"),
        ("BertForMultipleChoice", "AutoModelForMultipleChoice"),
    ),
    prefix="bert.",
    ignored=(r"embeddings\.position_ids$", r"embeddings\.token_type_ids$"),
    old_names=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
    refused=(("is_decoder", True, DECODER_ONLY), ("add_cross_attention", True, DECODER_ONLY)),
    unsupported=POST_NORM,
    examples=("google-bert/bert-base-uncased", "sentence-transformers/all-MiniLM-L6-v2"),
)
