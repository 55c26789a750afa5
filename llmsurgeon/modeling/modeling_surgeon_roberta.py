"""RoBERTa with blocks of differing shape; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.roberta import modeling_roberta as roberta
from transformers.models.roberta.configuration_roberta import RobertaConfig

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
class SurgeonRobertaConfig(SurgeonConfigMixin, RobertaConfig):
    model_type = "surgeon_roberta"
    block_configs: list | None = None


class SurgeonRobertaBlock(BertShapedBlock, roberta.RobertaLayer):
    """RobertaLayer with parts that may be absent."""


class Swapped(SurgeonModelMixin):
    """Mixed in before RoBERTa's own classes: their layers make room for the blocks of the config."""

    config_class = SurgeonRobertaConfig
    block_class = SurgeonRobertaBlock
    stack = "encoder.layer"
    _no_split_modules = ["RobertaEmbeddings", "SurgeonRobertaBlock"]


class SurgeonRobertaModel(Swapped, roberta.RobertaModel):
    pass


class SurgeonRobertaForMaskedLM(Swapped, roberta.RobertaForMaskedLM):
    pass


class SurgeonRobertaForSequenceClassification(Swapped, roberta.RobertaForSequenceClassification):
    pass


class SurgeonRobertaForTokenClassification(Swapped, roberta.RobertaForTokenClassification):
    pass


class SurgeonRobertaForQuestionAnswering(Swapped, roberta.RobertaForQuestionAnswering):
    pass


class SurgeonRobertaForMultipleChoice(Swapped, roberta.RobertaForMultipleChoice):
    pass


offer(
    AutoConfig=SurgeonRobertaConfig,
    AutoModel=SurgeonRobertaModel,
    AutoModelForMaskedLM=SurgeonRobertaForMaskedLM,
    AutoModelForSequenceClassification=SurgeonRobertaForSequenceClassification,
    AutoModelForTokenClassification=SurgeonRobertaForTokenClassification,
    AutoModelForQuestionAnswering=SurgeonRobertaForQuestionAnswering,
    AutoModelForMultipleChoice=SurgeonRobertaForMultipleChoice,
)
