"""Olmo2 with blocks of differing shape; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.olmo2.configuration_olmo2 import Olmo2Config
from transformers.models.olmo2.modeling_olmo2 import Olmo2DecoderLayer, Olmo2ForCausalLM

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
class SurgeonOlmo2Config(SurgeonConfigMixin, Olmo2Config):
    model_type = "surgeon_olmo2"
    block_configs: list | None = None


class SurgeonOlmo2Block(SurgeonBlock, Olmo2DecoderLayer):
    """Olmo2DecoderLayer with parts that may be absent."""

    attention_norm_name = None
    ffn_norm_name = None
    attention_post_norm_name = "post_attention_layernorm"
    ffn_post_norm_name = "post_feedforward_layernorm"
    attention_parts = ("self_attn", "post_attention_layernorm")
    ffn_parts = ("mlp", "post_feedforward_layernorm")


class SurgeonOlmo2ForCausalLM(SurgeonModelMixin, Olmo2ForCausalLM):
    config_class = SurgeonOlmo2Config
    _no_split_modules = ["SurgeonOlmo2Block", "ParallelBlock"]

    def __init__(self, config):
        super().__init__(config)
        swap_blocks(self.model.layers, config, SurgeonOlmo2Block)
        self.post_init()


SurgeonOlmo2Config.register_for_auto_class()
SurgeonOlmo2ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
