"""Mixtral with blocks of differing shape; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer, MixtralForCausalLM

from .surgeon_blocks import SurgeonBlock, SurgeonConfigMixin, SurgeonModelMixin, swap_blocks
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


class SurgeonMixtralBlock(SurgeonBlock, MixtralDecoderLayer):
    """MixtralDecoderLayer with parts that may be absent."""


class SurgeonMixtralForCausalLM(SurgeonModelMixin, MixtralForCausalLM):
    config_class = SurgeonMixtralConfig
    _no_split_modules = ["SurgeonMixtralBlock", "ParallelBlock"]

    def __init__(self, config):
        super().__init__(config)
        swap_blocks(self.model.layers, config, SurgeonMixtralBlock)
        self.post_init()


# Files hold each expert by itself, as the stock model's do; the class stacks them.
read_names_as("surgeon_mixtral", "mixtral")
SurgeonMixtralConfig.register_for_auto_class()
SurgeonMixtralForCausalLM.register_for_auto_class("AutoModelForCausalLM")
