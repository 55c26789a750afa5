"""GPT2 with blocks of differing shape; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2Block, GPT2LMHeadModel

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
class SurgeonGPT2Config(SurgeonConfigMixin, GPT2Config):
    model_type = "surgeon_gpt2"
    block_configs: list | None = None


class SurgeonGPT2Block(SurgeonBlock, GPT2Block):
    """GPT2Block with parts that may be absent."""

    returned_tuple = True
    attention_name = "attn"
    attention_norm_name = "ln_1"
    ffn_norm_name = "ln_2"


class SurgeonGPT2ForCausalLM(SurgeonModelMixin, GPT2LMHeadModel):
    config_class = SurgeonGPT2Config
    _no_split_modules = ["SurgeonGPT2Block", "ParallelBlock"]

    def __init__(self, config):
        super().__init__(config)
        swap_blocks(self.transformer.h, config, SurgeonGPT2Block, width_key="n_inner")
        self.post_init()


SurgeonGPT2Config.register_for_auto_class()
SurgeonGPT2ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
