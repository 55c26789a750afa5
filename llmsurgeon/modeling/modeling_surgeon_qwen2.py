"""Qwen2 with blocks of differing shape; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2ForCausalLM

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
class SurgeonQwen2Config(SurgeonConfigMixin, Qwen2Config):
    model_type = "surgeon_qwen2"
    block_configs: list | None = None


class SurgeonQwen2Block(SurgeonBlock, Qwen2DecoderLayer):
    """Qwen2DecoderLayer with parts that may be absent."""


class SurgeonQwen2ForCausalLM(SurgeonModelMixin, Qwen2ForCausalLM):
    config_class = SurgeonQwen2Config
    _no_split_modules = ["SurgeonQwen2Block", "ParallelBlock"]

    def __init__(self, config):
        super().__init__(config)
        swap_blocks(self.model.layers, config, SurgeonQwen2Block)
        pass_padding(self.model)
        self.post_init()


SurgeonQwen2Config.register_for_auto_class()
SurgeonQwen2ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
