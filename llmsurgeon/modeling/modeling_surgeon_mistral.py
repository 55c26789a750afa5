"""Mistral with blocks of differing shape; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralForCausalLM

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
class SurgeonMistralConfig(SurgeonConfigMixin, MistralConfig):
    model_type = "surgeon_mistral"
    block_configs: list | None = None


class SurgeonMistralBlock(SurgeonBlock, MistralDecoderLayer):
    """MistralDecoderLayer with parts that may be absent."""


class SurgeonMistralForCausalLM(SurgeonModelMixin, MistralForCausalLM):
    config_class = SurgeonMistralConfig
    _no_split_modules = ["SurgeonMistralBlock", "ParallelBlock"]

    def __init__(self, config):
        super().__init__(config)
        swap_blocks(self.model.layers, config, SurgeonMistralBlock)
        pass_padding(self.model)
        self.post_init()


SurgeonMistralConfig.register_for_auto_class()
SurgeonMistralForCausalLM.register_for_auto_class("AutoModelForCausalLM")
