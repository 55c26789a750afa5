"""Mistral as a block transformer; ships inside converted checkpoints."""

from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralForCausalLM, MistralModel

from .surgeon_block_transformer import BlockTransformerBody, BlockTransformerForCausalLM, BlockTransformerLayer
from .surgeon_blocks import SurgeonConfigMixin
from .surgeon_versions import strict


@strict
class BlockMistralConfig(SurgeonConfigMixin, MistralConfig):
    model_type = "surgeon_mistral"
    block_configs: list | None = None
    block_transformer: dict | None = None


class BlockMistralLayer(BlockTransformerLayer, MistralDecoderLayer):
    """MistralDecoderLayer with parts that may be absent, and a cross-attention where the config asks for one."""


class BlockMistralModel(BlockTransformerBody, MistralModel):
    layer_class = BlockMistralLayer


class BlockMistralForCausalLM(BlockTransformerForCausalLM, MistralForCausalLM):
    config_class = BlockMistralConfig
    body_class = BlockMistralModel
    _no_split_modules = ["BlockMistralLayer", "ParallelBlock"]


BlockMistralConfig.register_for_auto_class()
BlockMistralForCausalLM.register_for_auto_class("AutoModelForCausalLM")
