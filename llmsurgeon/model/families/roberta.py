"""RoBERTa: BERT's blocks, another masked-LM head, positions that begin behind the padding index."""

from dataclasses import replace

from llmsurgeon.model.families.bert import BERT

ROBERTA = replace(
    BERT,
    model_type="roberta",
    model_class="RobertaModel",
    head="lm_head.decoder",
    heads=(
        ("RobertaModel", "AutoModel"),
        ("RobertaForMaskedLM", "AutoModelForMaskedLM"),
        ("RobertaForSequenceClassification", "AutoModelForSequenceClassification"),
        ("RobertaForTokenClassification", "AutoModelForTokenClassification"),
        ("RobertaForQuestionAnswering", "AutoModelForQuestionAnswering"),
        ("RobertaForMultipleChoice", "AutoModelForMultipleChoice"),
    ),
    prefix="roberta.",
    reserved_positions_key="pad_token_id",
    examples=("FacebookAI/roberta-base", "sentence-transformers/all-distilroberta-v1"),
)
