"""Llama as a block transformer; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.llama import modeling_llama as llama
from transformers.models.llama.configuration_llama import LlamaConfig

from .surgeon_block_transformer import (
    BlockTransformer,
    BlockTransformerBody,
    BlockTransformerForCausalLM,
    BlockTransformerLayer,
)
from .surgeon_blocks import SurgeonConfigMixin, offer
from .surgeon_versions import strict

if TYPE_CHECKING:
    # transformers 4 copies the files that this one names, and not those that they name.
    from .surgeon_fff import fast_feed_forward  # noqa: F401
    from .surgeon_fff_numba import dot  # noqa: F401
    from .surgeon_fff_triton import activated  # noqa: F401
    from .surgeon_mlgru import MLGRU  # noqa: F401
    from .surgeon_mlgru_triton import scan  # noqa: F401


@strict
class BlockLlamaConfig(SurgeonConfigMixin, LlamaConfig):
    model_type = "surgeon_llama"
    block_configs: list | None = None
    block_transformer: dict | None = None


class BlockLlamaLayer(BlockTransformerLayer, llama.LlamaDecoderLayer):
    """LlamaDecoderLayer with parts that may be absent, and a cross-attention where the config asks for one."""


class BlockLlamaModel(BlockTransformerBody, llama.LlamaModel):
    config_class = BlockLlamaConfig
    layer_class = BlockLlamaLayer
    _no_split_modules = ["BlockLlamaLayer", "ParallelBlock"]


class BlockLlamaForCausalLM(BlockTransformerForCausalLM, llama.LlamaForCausalLM):
    config_class = BlockLlamaConfig
    body_class = BlockLlamaModel


class BlockLlamaForSequenceClassification(BlockTransformer, llama.LlamaForSequenceClassification):
    config_class = BlockLlamaConfig


class BlockLlamaForTokenClassification(BlockTransformer, llama.LlamaForTokenClassification):
    config_class = BlockLlamaConfig


offer(
    AutoConfig=BlockLlamaConfig,
    AutoModel=BlockLlamaModel,
    AutoModelForCausalLM=BlockLlamaForCausalLM,
    AutoModelForSequenceClassification=BlockLlamaForSequenceClassification,
    AutoModelForTokenClassification=BlockLlamaForTokenClassification,
)
