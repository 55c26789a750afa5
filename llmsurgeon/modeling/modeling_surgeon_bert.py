"""BERT with blocks of differing shape; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.bert import modeling_bert as bert
from transformers.models.bert.configuration_bert import BertConfig

from .surgeon_blocks import BertShapedBlock, SurgeonConfigMixin, SurgeonModelMixin, swap_blocks
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
    _no_split_modules = ["BertEmbeddings", "SurgeonBertBlock"]

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        swap_blocks(self.base_model.encoder.layer, config, SurgeonBertBlock)
        self.post_init()


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


SurgeonBertConfig.register_for_auto_class()
SurgeonBertModel.register_for_auto_class("AutoModel")
SurgeonBertForPreTraining.register_for_auto_class("AutoModelForPreTraining")
SurgeonBertForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
SurgeonBertForNextSentencePrediction.register_for_auto_class("AutoModelForNextSentencePrediction")
SurgeonBertForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
SurgeonBertForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
SurgeonBertForQuestionAnswering.register_for_auto_class("AutoModelForQuestionAnswering")
SurgeonBertForMultipleChoice.register_for_auto_class("AutoModelForMultipleChoice")
