"""ModernBERT with blocks of differing shape; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.modernbert import modeling_modernbert as modernbert
from transformers.models.modernbert.configuration_modernbert import ModernBertConfig

from .surgeon_blocks import SurgeonBlock, SurgeonConfigMixin, SurgeonModelMixin, offer
from .surgeon_versions import needs, strict

if TYPE_CHECKING:
    # transformers 4 copies the files that this one names, and not those that they name.
    from .surgeon_fff import fast_feed_forward  # noqa: F401
    from .surgeon_fff_numba import dot  # noqa: F401
    from .surgeon_fff_triton import activated  # noqa: F401
    from .surgeon_mlgru import MLGRU  # noqa: F401
    from .surgeon_mlgru_triton import scan  # noqa: F401


needs("5.14", "a ModernBERT in this form")


@strict
class SurgeonModernBertConfig(SurgeonConfigMixin, ModernBertConfig):
    model_type = "surgeon_modernbert"
    block_configs: list | None = None


class SurgeonModernBertBlock(SurgeonBlock, modernbert.ModernBertEncoderLayer):
    """ModernBertEncoderLayer with parts that may be absent."""

    attention_name = "attn"
    attention_norm_name = "attn_norm"
    ffn_norm_name = "mlp_norm"
    ffn_in_names = ("mlp.Wi",)


class Swapped(SurgeonModelMixin):
    """Mixed in before ModernBERT's own classes: their layers make room for the blocks of the config."""

    config_class = SurgeonModernBertConfig
    block_class = SurgeonModernBertBlock
    _no_split_modules = ["ModernBertEmbeddings", "SurgeonModernBertBlock", "ParallelBlock"]


class SurgeonModernBertModel(Swapped, modernbert.ModernBertModel):
    pass


class SurgeonModernBertForMaskedLM(Swapped, modernbert.ModernBertForMaskedLM):
    pass


class SurgeonModernBertForSequenceClassification(Swapped, modernbert.ModernBertForSequenceClassification):
    pass


class SurgeonModernBertForTokenClassification(Swapped, modernbert.ModernBertForTokenClassification):
    pass


class SurgeonModernBertForQuestionAnswering(Swapped, modernbert.ModernBertForQuestionAnswering):
    pass


class SurgeonModernBertForMultipleChoice(Swapped, modernbert.ModernBertForMultipleChoice):
    pass


offer(
    AutoConfig=SurgeonModernBertConfig,
    AutoModel=SurgeonModernBertModel,
    AutoModelForMaskedLM=SurgeonModernBertForMaskedLM,
    AutoModelForSequenceClassification=SurgeonModernBertForSequenceClassification,
    AutoModelForTokenClassification=SurgeonModernBertForTokenClassification,
    AutoModelForQuestionAnswering=SurgeonModernBertForQuestionAnswering,
    AutoModelForMultipleChoice=SurgeonModernBertForMultipleChoice,
)
