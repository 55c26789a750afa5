"""Gemma3 (text) with blocks of differing shape; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.gemma3 import modeling_gemma3 as gemma3
from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig

from .surgeon_blocks import SurgeonBlock, SurgeonConfigMixin, SurgeonModelMixin, offer
from .surgeon_versions import needs, strict

if TYPE_CHECKING:
    # transformers 4 copies the files that this one names, and not those that they name.
    from .surgeon_fff import fast_feed_forward  # noqa: F401
    from .surgeon_fff_numba import dot  # noqa: F401
    from .surgeon_fff_triton import activated  # noqa: F401
    from .surgeon_mlgru import MLGRU  # noqa: F401
    from .surgeon_mlgru_triton import scan  # noqa: F401


needs("5.14", "a Gemma 3 in this form")


@strict
class SurgeonGemma3TextConfig(SurgeonConfigMixin, Gemma3TextConfig):
    model_type = "surgeon_gemma3_text"
    block_configs: list | None = None


class SurgeonGemma3TextBlock(SurgeonBlock, gemma3.Gemma3DecoderLayer):
    """Gemma3DecoderLayer with parts that may be absent."""

    ffn_norm_name = "pre_feedforward_layernorm"
    attention_post_norm_name = "post_attention_layernorm"
    ffn_post_norm_name = "post_feedforward_layernorm"
    attention_parts = ("self_attn", "input_layernorm", "post_attention_layernorm")
    ffn_parts = ("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm")


class Swapped(SurgeonModelMixin):
    """Mixed in before Gemma 3's own classes: their layers make room for the blocks of the config."""

    config_class = SurgeonGemma3TextConfig
    block_class = SurgeonGemma3TextBlock
    _no_split_modules = ["SurgeonGemma3TextBlock", "ParallelBlock"]


class SurgeonGemma3TextModel(Swapped, gemma3.Gemma3TextModel):
    pass


class SurgeonGemma3TextForCausalLM(Swapped, gemma3.Gemma3ForCausalLM):
    pass


class SurgeonGemma3TextForSequenceClassification(Swapped, gemma3.Gemma3TextForSequenceClassification):
    pass


offer(
    AutoConfig=SurgeonGemma3TextConfig,
    AutoModel=SurgeonGemma3TextModel,
    AutoModelForCausalLM=SurgeonGemma3TextForCausalLM,
    AutoModelForSequenceClassification=SurgeonGemma3TextForSequenceClassification,
)
