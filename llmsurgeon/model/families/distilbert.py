"""DistilBERT: BERT's maths under names of its own, with no token types and no pooler."""

from dataclasses import replace

from llmsurgeon.model.families.bert import BERT

DISTILBERT = replace(
    BERT,
    model_type="distilbert",
    model_class="DistilBertModel",
    layers="transformer.layer",
    attention_norm="sa_layer_norm",
    attention_out="out_lin",
    ffn="ffn",
    ffn_norm="output_layer_norm",
    ffn_in=("lin1",),
    ffn_out="lin2",
    head="vocab_projector",
    hidden_key="dim",
    layers_key="n_layers",
    heads_key="n_heads",
    width_key="hidden_dim",
    heads=(
        ("DistilBertModel", "AutoModel"),
        ("DistilBertForMaskedLM", "AutoModelForMaskedLM"),
        ("DistilBertForSequenceClassification", "AutoModelForSequenceClassification"),
        ("DistilBertForTokenClassification", "AutoModelForTokenClassification"),
        ("DistilBertForQuestionAnswering", "AutoModelForQuestionAnswering"),
        ("DistilBertForMultipleChoice", "AutoModelForMultipleChoice"),
    ),
    prefix="distilbert.",
    refused=(),
    examples=("distilbert/distilbert-base-uncased", "distilbert/distilbert-base-uncased-finetuned-sst-2-english"),
)
