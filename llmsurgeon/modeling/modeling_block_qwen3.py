"""Qwen3 as a block transformer; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

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
class BlockQwen3Config(SurgeonConfigMixin, Qwen3Config):
    model_type = "surgeon_qwen3"
    block_configs: list | None = None
    block_transformer: dict | None = None


class BlockQwen3Layer(BlockTransformerLayer, qwen3.Qwen3DecoderLayer):
    """Qwen3DecoderLayer with parts that may be absent, and a cross-attention where the config asks for one."""


class BlockQwen3Model(BlockTransformerBody, qwen3.Qwen3Model):
    config_class = BlockQwen3Config
    layer_class = BlockQwen3Layer
    _no_split_modules = ["BlockQwen3Layer", "ParallelBlock"]


class BlockQwen3ForCausalLM(BlockTransformerForCausalLM, qwen3.Qwen3ForCausalLM):
    config_class = BlockQwen3Config
    body_class = BlockQwen3Model


class BlockQwen3ForSequenceClassification(BlockTransformer, qwen3.Qwen3ForSequenceClassification):
    config_class = BlockQwen3Config


class BlockQwen3ForTokenClassification(BlockTransformer, qwen3.Qwen3ForTokenClassification):
    config_class = BlockQwen3Config


offer(
    AutoConfig=BlockQwen3Config,
    AutoModel=BlockQwen3Model,
    AutoModelForCausalLM=BlockQwen3ForCausalLM,
    AutoModelForSequenceClassification=BlockQwen3ForSequenceClassification,
    AutoModelForTokenClassification=BlockQwen3ForTokenClassification,
)
