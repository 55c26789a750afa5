"""BERT with blocks of differing shape; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.bert import modeling_bert as bert
from transformers.models.bert.configuration_bert import BertConfig

from .surgeon_blocks import BertShapedBlock, SurgeonConfigMixin, SurgeonModelMixin, offer
from .surgeon_versions import strict

if TYPE_CHECKING:
    # transformers 4 copies the files that this one names, and not those that they name.
    from .surgeon_fff import fast_feed_forward  # noqa: F401
    from .surgeon_fff_numba import dot  # noqa: F401
    from .surgeon_fff_triton import activated  # noqa: F401
    from .surgeon_mlgru import MLGRU  # noqa: F401
    from .surgeon_mlgru_triton import scan  # noqa: F401


@strict
class SurgeonBertConfig(SurgeonConfigMixin, BertConfig):
    model_type = "surgeon_bert"
    block_configs: list | None = None


class SurgeonBertBlock(BertShapedBlock, bert.BertLayer):
    """BertLayer with parts that may be absent."""


class Swapped(SurgeonModelMixin):
    """Mixed in before BERT's own classes: their layers make room for the blocks of the config."""

    config_class = SurgeonBertConfig
    block_class = SurgeonBertBlock
    stack = "encoder.layer"
    _no_split_modules = ["BertEmbeddings", "SurgeonBertBlock"]


class SurgeonBertModel(Swapped, bert.BertModel):
    pass


class SurgeonBertForPreTraining(Swapped, bert.BertForPreTraining):
    pass


class SurgeonBertForMaskedLM(Swapped, bert.BertForMaskedLM):
    pass


class SurgeonBertForNextSentencePrediction(Swapped, bert.BertForNextSentencePrediction):
    pass


class SurgeonBertForSequenceClassification(Swapped, bert.BertForSequenceClassification):
    pass


class SurgeonBertForTokenClassification(Swapped, bert.BertForTokenClassification):
    pass


class SurgeonBertForQuestionAnswering(Swapped, bert.BertForQuestionAnswering):
    pass


class SurgeonBertForMultipleChoice(Swapped, bert.BertForMultipleChoice):
    pass


offer(
    AutoConfig=SurgeonBertConfig,
    AutoModel=SurgeonBertModel,
    AutoModelForPreTraining=SurgeonBertForPreTraining,
    AutoModelForMaskedLM=SurgeonBertForMaskedLM,
    AutoModelForNextSentencePrediction=SurgeonBertForNextSentencePrediction,
    AutoModelForSequenceClassification=SurgeonBertForSequenceClassification,
    AutoModelForTokenClassification=SurgeonBertForTokenClassification,
    AutoModelForQuestionAnswering=SurgeonBertForQuestionAnswering,
    AutoModelForMultipleChoice=SurgeonBertForMultipleChoice,
)
