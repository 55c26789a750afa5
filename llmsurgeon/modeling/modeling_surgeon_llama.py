"""Llama with blocks of differing shape; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM

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
class SurgeonLlamaConfig(SurgeonConfigMixin, LlamaConfig):
    model_type = "surgeon_llama"
    block_configs: list | None = None


class SurgeonLlamaBlock(SurgeonBlock, LlamaDecoderLayer):
    """LlamaDecoderLayer with parts that may be absent."""


class SurgeonLlamaForCausalLM(SurgeonModelMixin, LlamaForCausalLM):
    config_class = SurgeonLlamaConfig
    _no_split_modules = ["SurgeonLlamaBlock", "ParallelBlock"]

    def __init__(self, config):
        super().__init__(config)
        swap_blocks(self.model.layers, config, SurgeonLlamaBlock)
        pass_padding(self.model)
        self.post_init()


SurgeonLlamaConfig.register_for_auto_class()
SurgeonLlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
