"""Qwen2 as a block transformer; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config

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
class BlockQwen2Config(SurgeonConfigMixin, Qwen2Config):
    model_type = "surgeon_qwen2"
    block_configs: list | None = None
    block_transformer: dict | None = None


class BlockQwen2Layer(BlockTransformerLayer, qwen2.Qwen2DecoderLayer):
    """Qwen2DecoderLayer with parts that may be absent, and a cross-attention where the config asks for one."""


class BlockQwen2Model(BlockTransformerBody, qwen2.Qwen2Model):
    config_class = BlockQwen2Config
    layer_class = BlockQwen2Layer
    _no_split_modules = ["BlockQwen2Layer", "ParallelBlock"]


class BlockQwen2ForCausalLM(BlockTransformerForCausalLM, qwen2.Qwen2ForCausalLM):
    config_class = BlockQwen2Config
    body_class = BlockQwen2Model


class BlockQwen2ForSequenceClassification(BlockTransformer, qwen2.Qwen2ForSequenceClassification):
    config_class = BlockQwen2Config


class BlockQwen2ForTokenClassification(BlockTransformer, qwen2.Qwen2ForTokenClassification):
    config_class = BlockQwen2Config


offer(
    AutoConfig=BlockQwen2Config,
    AutoModel=BlockQwen2Model,
    AutoModelForCausalLM=BlockQwen2ForCausalLM,
    AutoModelForSequenceClassification=BlockQwen2ForSequenceClassification,
    AutoModelForTokenClassification=BlockQwen2ForTokenClassification,
)
