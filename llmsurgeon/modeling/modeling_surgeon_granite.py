"""Granite with blocks of differing shape; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.granite import modeling_granite as granite
from transformers.models.granite.configuration_granite import GraniteConfig

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
class SurgeonGraniteConfig(SurgeonConfigMixin, GraniteConfig):
    model_type = "surgeon_granite"
    block_configs: list | None = None


class SurgeonGraniteBlock(SurgeonBlock, granite.GraniteDecoderLayer):
    """GraniteDecoderLayer, which holds a residual_multiplier, with parts that may be absent."""

    returned_tuple = True


class Swapped(SurgeonModelMixin):
    """Mixed in before Granite's own classes: their layers make room for the blocks of the config."""

    config_class = SurgeonGraniteConfig
    block_class = SurgeonGraniteBlock
    _no_split_modules = ["SurgeonGraniteBlock", "ParallelBlock"]


class SurgeonGraniteModel(Swapped, granite.GraniteModel):
    pass


class SurgeonGraniteForCausalLM(Swapped, granite.GraniteForCausalLM):
    pass


offer(
    AutoConfig=SurgeonGraniteConfig,
    AutoModel=SurgeonGraniteModel,
    AutoModelForCausalLM=SurgeonGraniteForCausalLM,
)
