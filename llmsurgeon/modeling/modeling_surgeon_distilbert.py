"""DistilBERT with blocks of differing shape; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.distilbert import modeling_distilbert as distilbert
from transformers.models.distilbert.configuration_distilbert import DistilBertConfig

from .surgeon_blocks import PostNormBlock, SurgeonConfigMixin, SurgeonModelMixin, offer
from .surgeon_versions import layer_call, needs, strict

if TYPE_CHECKING:
    # transformers 4 copies the files that this one names, and not those that they name.
    from .surgeon_fff import fast_feed_forward  # noqa: F401
    from .surgeon_fff_numba import dot  # noqa: F401
    from .surgeon_fff_triton import activated  # noqa: F401
    from .surgeon_mlgru import MLGRU  # noqa: F401
    from .surgeon_mlgru_triton import scan  # noqa: F401


needs("5.14", "a DistilBERT in this form")


@strict
class SurgeonDistilBertConfig(SurgeonConfigMixin, DistilBertConfig):
    model_type = "surgeon_distilbert"
    block_configs: list | None = None


class SurgeonDistilBertBlock(PostNormBlock, distilbert.TransformerBlock):
    """TransformerBlock with parts that may be absent."""

    width_key = "hidden_dim"
    attention_name = "attention"
    attention_parts = ("attention",)
    ffn_parts = ("ffn",)
    ffn_name = "ffn"

    def __init__(self, config, layer_idx):
        super().__init__(config)

    def attended(self, hidden_BTD, *args, **kwargs):
        call = layer_call(self, args, kwargs)
        if not hasattr(self, "attention"):
            return self.sa_layer_norm(hidden_BTD)
        return self.sa_layer_norm(self.attention(hidden_BTD, **call)[0] + hidden_BTD)

    def fed_forward(self, hidden_BTD):
        if not hasattr(self, "ffn"):
            return self.output_layer_norm(hidden_BTD)
        return self.output_layer_norm(self.ffn(hidden_BTD) + hidden_BTD)


class Swapped(SurgeonModelMixin):
    """Mixed in before DistilBERT's own classes: their layers make room for the blocks of the config."""

    config_class = SurgeonDistilBertConfig
    block_class = SurgeonDistilBertBlock
    stack = "transformer.layer"
    _no_split_modules = ["SurgeonDistilBertBlock"]


class SurgeonDistilBertModel(Swapped, distilbert.DistilBertModel):
    pass


class SurgeonDistilBertForMaskedLM(Swapped, distilbert.DistilBertForMaskedLM):
    pass


class SurgeonDistilBertForSequenceClassification(Swapped, distilbert.DistilBertForSequenceClassification):
    pass


class SurgeonDistilBertForTokenClassification(Swapped, distilbert.DistilBertForTokenClassification):
    pass


class SurgeonDistilBertForQuestionAnswering(Swapped, distilbert.DistilBertForQuestionAnswering):
    pass


class SurgeonDistilBertForMultipleChoice(Swapped, distilbert.DistilBertForMultipleChoice):
    pass


offer(
    AutoConfig=SurgeonDistilBertConfig,
    AutoModel=SurgeonDistilBertModel,
    AutoModelForMaskedLM=SurgeonDistilBertForMaskedLM,
    AutoModelForSequenceClassification=SurgeonDistilBertForSequenceClassification,
    AutoModelForTokenClassification=SurgeonDistilBertForTokenClassification,
    AutoModelForQuestionAnswering=SurgeonDistilBertForQuestionAnswering,
    AutoModelForMultipleChoice=SurgeonDistilBertForMultipleChoice,
)
