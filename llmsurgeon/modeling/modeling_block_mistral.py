"""Mistral as a block transformer; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.mistral.configuration_mistral import MistralConfig

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
class BlockMistralConfig(SurgeonConfigMixin, MistralConfig):
    model_type = "surgeon_mistral"
    block_configs: list | None = None
    block_transformer: dict | None = None


class BlockMistralLayer(BlockTransformerLayer, mistral.MistralDecoderLayer):
    """MistralDecoderLayer with parts that may be absent, and a cross-attention where the config asks for one."""


class BlockMistralModel(BlockTransformerBody, mistral.MistralModel):
    config_class = BlockMistralConfig
    layer_class = BlockMistralLayer
    _no_split_modules = ["BlockMistralLayer", "ParallelBlock"]


class BlockMistralForCausalLM(BlockTransformerForCausalLM, mistral.MistralForCausalLM):
    config_class = BlockMistralConfig
    body_class = BlockMistralModel


class BlockMistralForSequenceClassification(BlockTransformer, mistral.MistralForSequenceClassification):
    config_class = BlockMistralConfig


class BlockMistralForTokenClassification(BlockTransformer, mistral.MistralForTokenClassification):
    config_class = BlockMistralConfig


offer(
    AutoConfig=BlockMistralConfig,
    AutoModel=BlockMistralModel,
    AutoModelForCausalLM=BlockMistralForCausalLM,
    AutoModelForSequenceClassification=BlockMistralForSequenceClassification,
    AutoModelForTokenClassification=BlockMistralForTokenClassification,
)
