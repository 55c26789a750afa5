"""Qwen3 MoE with blocks of differing shape; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig

from .surgeon_blocks import SurgeonBlock, SurgeonConfigMixin, SurgeonModelMixin, offer
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


class SurgeonQwen3MoeBlock(SurgeonBlock, qwen3_moe.Qwen3MoeDecoderLayer):
    """Qwen3MoeDecoderLayer with parts that may be absent."""

    width_key = "moe_intermediate_size"


class Swapped(SurgeonModelMixin):
    """Mixed in before Qwen3 MoE's own classes: their layers make room for the blocks of the config."""

    config_class = SurgeonQwen3MoeConfig
    block_class = SurgeonQwen3MoeBlock
    _no_split_modules = ["SurgeonQwen3MoeBlock", "ParallelBlock"]


class SurgeonQwen3MoeModel(Swapped, qwen3_moe.Qwen3MoeModel):
    pass


class SurgeonQwen3MoeForCausalLM(Swapped, qwen3_moe.Qwen3MoeForCausalLM):
    pass


class SurgeonQwen3MoeForSequenceClassification(Swapped, qwen3_moe.Qwen3MoeForSequenceClassification):
    pass


class SurgeonQwen3MoeForTokenClassification(Swapped, qwen3_moe.Qwen3MoeForTokenClassification):
    pass


# Files hold each expert by itself, as the stock model's do; the class stacks them.
read_names_as("surgeon_qwen3_moe", "qwen3_moe")
offer(
    AutoConfig=SurgeonQwen3MoeConfig,
    AutoModel=SurgeonQwen3MoeModel,
    AutoModelForCausalLM=SurgeonQwen3MoeForCausalLM,
    AutoModelForSequenceClassification=SurgeonQwen3MoeForSequenceClassification,
    AutoModelForTokenClassification=SurgeonQwen3MoeForTokenClassification,
)
