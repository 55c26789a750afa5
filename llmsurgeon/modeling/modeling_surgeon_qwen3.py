"""Qwen3 with blocks of differing shape; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3ForCausalLM

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
class SurgeonQwen3Config(SurgeonConfigMixin, Qwen3Config):
    model_type = "surgeon_qwen3"
    block_configs: list | None = None


class SurgeonQwen3Block(SurgeonBlock, Qwen3DecoderLayer):
    """Qwen3DecoderLayer with parts that may be absent."""


class SurgeonQwen3ForCausalLM(SurgeonModelMixin, Qwen3ForCausalLM):
    config_class = SurgeonQwen3Config
    _no_split_modules = ["SurgeonQwen3Block", "ParallelBlock"]

    def __init__(self, config):
        super().__init__(config)
        swap_blocks(self.model.layers, config, SurgeonQwen3Block)
        pass_padding(self.model)
        self.post_init()


SurgeonQwen3Config.register_for_auto_class()
SurgeonQwen3ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
