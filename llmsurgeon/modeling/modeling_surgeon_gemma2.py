"""Gemma2 with blocks of differing shape; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.gemma2 import modeling_gemma2 as gemma2
from transformers.models.gemma2.configuration_gemma2 import Gemma2Config

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
class SurgeonGemma2Config(SurgeonConfigMixin, Gemma2Config):
    model_type = "surgeon_gemma2"
    block_configs: list | None = None


class SurgeonGemma2Block(SurgeonBlock, gemma2.Gemma2DecoderLayer):
    """Gemma2DecoderLayer with parts that may be absent."""

    returned_tuple = True
    ffn_norm_name = "pre_feedforward_layernorm"
    attention_post_norm_name = "post_attention_layernorm"
    ffn_post_norm_name = "post_feedforward_layernorm"
    attention_parts = ("self_attn", "input_layernorm", "post_attention_layernorm")
    ffn_parts = ("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm")


class Swapped(SurgeonModelMixin):
    """Mixed in before Gemma2's own classes: their layers make room for the blocks of the config."""

    config_class = SurgeonGemma2Config
    block_class = SurgeonGemma2Block
    _no_split_modules = ["SurgeonGemma2Block", "ParallelBlock"]


class SurgeonGemma2Model(Swapped, gemma2.Gemma2Model):
    pass


class SurgeonGemma2ForCausalLM(Swapped, gemma2.Gemma2ForCausalLM):
    pass


class SurgeonGemma2ForSequenceClassification(Swapped, gemma2.Gemma2ForSequenceClassification):
    pass


class SurgeonGemma2ForTokenClassification(Swapped, gemma2.Gemma2ForTokenClassification):
    pass


offer(
    AutoConfig=SurgeonGemma2Config,
    AutoModel=SurgeonGemma2Model,
    AutoModelForCausalLM=SurgeonGemma2ForCausalLM,
    AutoModelForSequenceClassification=SurgeonGemma2ForSequenceClassification,
    AutoModelForTokenClassification=SurgeonGemma2ForTokenClassification,
)
