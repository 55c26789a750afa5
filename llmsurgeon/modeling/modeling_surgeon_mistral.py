"""Mistral with blocks of differing shape; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.mistral.configuration_mistral import MistralConfig

from .surgeon_blocks import SurgeonBlock, SurgeonConfigMixin, SurgeonModelMixin, offer
from .surgeon_versions import strict

if TYPE_CHECKING:
    # transformers 4 copies the files that this one names, and not those that they name.
    from .surgeon_fff import fast_feed_forward  # noqa: F401
    from .surgeon_fff_numba import dot  # noqa: F401
    from .surgeon_fff_triton import activated  # noqa: F401
    from .surgeon_mlgru import MLGRU  # noqa: F401
    from .surgeon_mlgru_triton import scan  # noqa: F401


@strict
class SurgeonMistralConfig(SurgeonConfigMixin, MistralConfig):
    model_type = "surgeon_mistral"
    block_configs: list | None = None


class SurgeonMistralBlock(SurgeonBlock, mistral.MistralDecoderLayer):
    """MistralDecoderLayer with parts that may be absent."""


class Swapped(SurgeonModelMixin):
    """Mixed in before Mistral's own classes: their layers make room for the blocks of the config."""

    config_class = SurgeonMistralConfig
    block_class = SurgeonMistralBlock
    _no_split_modules = ["SurgeonMistralBlock", "ParallelBlock"]


class SurgeonMistralModel(Swapped, mistral.MistralModel):
    pass


class SurgeonMistralForCausalLM(Swapped, mistral.MistralForCausalLM):
    pass


class SurgeonMistralForSequenceClassification(Swapped, mistral.MistralForSequenceClassification):
    pass


class SurgeonMistralForTokenClassification(Swapped, mistral.MistralForTokenClassification):
    pass


offer(
    AutoConfig=SurgeonMistralConfig,
    AutoModel=SurgeonMistralModel,
    AutoModelForCausalLM=SurgeonMistralForCausalLM,
    AutoModelForSequenceClassification=SurgeonMistralForSequenceClassification,
    AutoModelForTokenClassification=SurgeonMistralForTokenClassification,
)
