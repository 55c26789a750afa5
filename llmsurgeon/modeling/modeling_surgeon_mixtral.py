"""Mixtral with blocks of differing shape; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.mixtral.configuration_mixtral import MixtralConfig

from .surgeon_blocks import SurgeonBlock, SurgeonConfigMixin, SurgeonModelMixin, offer
from .surgeon_versions import needs, read_names_as, strict

if TYPE_CHECKING:
    # transformers 4 copies the files that this one names, and not those that they name.
    from .surgeon_fff import fast_feed_forward  # noqa: F401
    from .surgeon_fff_numba import dot  # noqa: F401
    from .surgeon_fff_triton import activated  # noqa: F401
    from .surgeon_mlgru import MLGRU  # noqa: F401
    from .surgeon_mlgru_triton import scan  # noqa: F401


needs("5.14", "a Mixtral in this form")


@strict
class SurgeonMixtralConfig(SurgeonConfigMixin, MixtralConfig):
    model_type = "surgeon_mixtral"
    block_configs: list | None = None


class SurgeonMixtralBlock(SurgeonBlock, mixtral.MixtralDecoderLayer):
    """MixtralDecoderLayer with parts that may be absent."""


class Swapped(SurgeonModelMixin):
    """Mixed in before Mixtral's own classes: their layers make room for the blocks of the config."""

    config_class = SurgeonMixtralConfig
    block_class = SurgeonMixtralBlock
    _no_split_modules = ["SurgeonMixtralBlock", "ParallelBlock"]


class SurgeonMixtralModel(Swapped, mixtral.MixtralModel):
    pass


class SurgeonMixtralForCausalLM(Swapped, mixtral.MixtralForCausalLM):
    pass


class SurgeonMixtralForSequenceClassification(Swapped, mixtral.MixtralForSequenceClassification):
    pass


class SurgeonMixtralForTokenClassification(Swapped, mixtral.MixtralForTokenClassification):
    pass


# Files hold each expert by itself, as the stock model's do; the class stacks them.
read_names_as("surgeon_mixtral", "mixtral")
offer(
    AutoConfig=SurgeonMixtralConfig,
    AutoModel=SurgeonMixtralModel,
    AutoModelForCausalLM=SurgeonMixtralForCausalLM,
    AutoModelForSequenceClassification=SurgeonMixtralForSequenceClassification,
    AutoModelForTokenClassification=SurgeonMixtralForTokenClassification,
)
