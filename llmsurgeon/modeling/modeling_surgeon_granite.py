"""Granite with blocks of differing shape; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.granite.configuration_granite import GraniteConfig
from transformers.models.granite.modeling_granite import GraniteDecoderLayer, GraniteForCausalLM

from .surgeon_blocks import SurgeonBlock, SurgeonConfigMixin, SurgeonModelMixin, swap_blocks
from .surgeon_mlgru import pass_padding
from .surgeon_versions import strict

if TYPE_CHECKING:
    # transformers 4 copies the files that this one names, and not those that they name.
    from .surgeon_fff import fast_feed_forward  # noqa: F401
    from .surgeon_fff_numba import dot  # noqa: F401
    from .surgeon_fff_triton import activated  # noqa: F401
    from .surgeon_mlgru_triton import scan  # noqa: F401


@strict
class SurgeonGraniteConfig(SurgeonConfigMixin, GraniteConfig):
    model_type = "surgeon_granite"
    block_configs: list | None = None


class SurgeonGraniteBlock(SurgeonBlock, GraniteDecoderLayer):
    """GraniteDecoderLayer, which holds a residual_multiplier, with parts that may be absent."""

    returned_tuple = True


class SurgeonGraniteForCausalLM(SurgeonModelMixin, GraniteForCausalLM):
    config_class = SurgeonGraniteConfig
    _no_split_modules = ["SurgeonGraniteBlock", "ParallelBlock"]

    def __init__(self, config):
        super().__init__(config)
        swap_blocks(self.model.layers, config, SurgeonGraniteBlock)
        pass_padding(self.model)
        self.post_init()


SurgeonGraniteConfig.register_for_auto_class()
SurgeonGraniteForCausalLM.register_for_auto_class("AutoModelForCausalLM")
