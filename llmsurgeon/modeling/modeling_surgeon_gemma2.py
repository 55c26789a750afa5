"""Gemma2 with blocks of differing shape; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer, Gemma2ForCausalLM

from .surgeon_blocks import SurgeonBlock, SurgeonConfigMixin, SurgeonModelMixin, swap_blocks
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


class SurgeonGemma2Block(SurgeonBlock, Gemma2DecoderLayer):
    """Gemma2DecoderLayer with parts that may be absent."""

    returned_tuple = True
    ffn_norm_name = "pre_feedforward_layernorm"
    attention_post_norm_name = "post_attention_layernorm"
    ffn_post_norm_name = "post_feedforward_layernorm"
    attention_parts = ("self_attn", "input_layernorm", "post_attention_layernorm")
    ffn_parts = ("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm")


class SurgeonGemma2ForCausalLM(SurgeonModelMixin, Gemma2ForCausalLM):
    config_class = SurgeonGemma2Config
    _no_split_modules = ["SurgeonGemma2Block", "ParallelBlock"]

    def __init__(self, config):
        super().__init__(config)
        swap_blocks(self.model.layers, config, SurgeonGemma2Block)
        self.post_init()


SurgeonGemma2Config.register_for_auto_class()
SurgeonGemma2ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
