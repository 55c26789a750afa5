"""Qwen2 as a block transformer; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2ForCausalLM, Qwen2Model

from .surgeon_block_transformer import BlockTransformerBody, BlockTransformerForCausalLM, BlockTransformerLayer
from .surgeon_blocks import SurgeonConfigMixin
from .surgeon_versions import strict

if TYPE_CHECKING:
    # transformers 4 copies the files that this one names, and not those that they name.
    from .surgeon_fff import fast_feed_forward  # noqa: F401
    from .surgeon_fff_numba import dot  # noqa: F401
    from .surgeon_fff_triton import activated  # noqa: F401
    from .surgeon_mlgru import MLGRU  # noqa: F401
    from .surgeon_mlgru_triton import scan  # noqa: F401


@strict
class BlockQwen2Config(SurgeonConfigMixin, Qwen2Config):
    model_type = "surgeon_qwen2"
    block_configs: list | None = None
    block_transformer: dict | None = None


class BlockQwen2Layer(BlockTransformerLayer, Qwen2DecoderLayer):
    """Qwen2DecoderLayer with parts that may be absent, and a cross-attention where the config asks for one."""


class BlockQwen2Model(BlockTransformerBody, Qwen2Model):
    layer_class = BlockQwen2Layer


class BlockQwen2ForCausalLM(BlockTransformerForCausalLM, Qwen2ForCausalLM):
    config_class = BlockQwen2Config
    body_class = BlockQwen2Model
    _no_split_modules = ["BlockQwen2Layer", "ParallelBlock"]


BlockQwen2Config.register_for_auto_class()
BlockQwen2ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
