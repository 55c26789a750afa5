"""Qwen3 MoE with blocks of differing shape; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer, Qwen3MoeForCausalLM

from .surgeon_blocks import SurgeonBlock, SurgeonConfigMixin, SurgeonModelMixin, swap_blocks
from .surgeon_versions import needs, read_names_as, strict

if TYPE_CHECKING:
    # transformers 4 copies the files that this one names, and not those that they name.
    from .surgeon_fff import fast_feed_forward  # noqa: F401
    from .surgeon_fff_numba import dot  # noqa: F401
    from .surgeon_fff_triton import activated  # noqa: F401
    from .surgeon_mlgru import MLGRU  # noqa: F401
    from .surgeon_mlgru_triton import scan  # noqa: F401


needs("5.14", "a Qwen3 MoE in this form")


@strict
class SurgeonQwen3MoeConfig(SurgeonConfigMixin, Qwen3MoeConfig):
    model_type = "surgeon_qwen3_moe"
    block_configs: list | None = None


class SurgeonQwen3MoeBlock(SurgeonBlock, Qwen3MoeDecoderLayer):
    """Qwen3MoeDecoderLayer with parts that may be absent."""


class SurgeonQwen3MoeForCausalLM(SurgeonModelMixin, Qwen3MoeForCausalLM):
    config_class = SurgeonQwen3MoeConfig
    _no_split_modules = ["SurgeonQwen3MoeBlock", "ParallelBlock"]

    def __init__(self, config):
        super().__init__(config)
        swap_blocks(self.model.layers, config, SurgeonQwen3MoeBlock, width_key="moe_intermediate_size")
        self.post_init()


# Files hold each expert by itself, as the stock model's do; the class stacks them.
read_names_as("surgeon_qwen3_moe", "qwen3_moe")
SurgeonQwen3MoeConfig.register_for_auto_class()
SurgeonQwen3MoeForCausalLM.register_for_auto_class("AutoModelForCausalLM")
