"""Llama with blocks of differing shape; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.llama import modeling_llama as llama
from transformers.models.llama.configuration_llama import LlamaConfig

from .surgeon_blocks import SurgeonBlock, SurgeonConfigMixin, SurgeonModelMixin, offer
from .surgeon_versions import strict

if TYPE_CHECKING:
    # transformers 4 copies the files that this one names, and not those that they name.
    from .surgeon_fff import fast_feed_forward  # noqa: F401
    from .surgeon_fff_numba import dot  # noqa: F401
    from .surgeon_fff_triton import activated  # noqa: F401
    from .surgeon_mlgru import MLGRU  # noqa: F401
    from .surgeon_mlgru_triton import scan  # noqa: F401


@strict
class SurgeonLlamaConfig(SurgeonConfigMixin, LlamaConfig):
    model_type = "surgeon_llama"
    block_configs: list | None = None


class SurgeonLlamaBlock(SurgeonBlock, llama.LlamaDecoderLayer):
    """LlamaDecoderLayer with parts that may be absent."""


class Swapped(SurgeonModelMixin):
    """Mixed in before Llama's own classes: their layers make room for the blocks of the config."""

    config_class = SurgeonLlamaConfig
    block_class = SurgeonLlamaBlock
    _no_split_modules = ["SurgeonLlamaBlock", "ParallelBlock"]


class SurgeonLlamaModel(Swapped, llama.LlamaModel):
    pass


class SurgeonLlamaForCausalLM(Swapped, llama.LlamaForCausalLM):
    pass


class SurgeonLlamaForSequenceClassification(Swapped, llama.LlamaForSequenceClassification):
    pass


class SurgeonLlamaForTokenClassification(Swapped, llama.LlamaForTokenClassification):
    pass


offer(
    AutoConfig=SurgeonLlamaConfig,
    AutoModel=SurgeonLlamaModel,
    AutoModelForCausalLM=SurgeonLlamaForCausalLM,
    AutoModelForSequenceClassification=SurgeonLlamaForSequenceClassification,
    AutoModelForTokenClassification=SurgeonLlamaForTokenClassification,
)
