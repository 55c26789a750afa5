"""GPTNeoX with blocks of differing shape; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.gpt_neox.configuration_gpt_neox import GPTNeoXConfig
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXForCausalLM, GPTNeoXLayer

from .surgeon_blocks import SurgeonBlock, SurgeonConfigMixin, SurgeonModelMixin, swap_blocks
from .surgeon_versions import needs, strict

if TYPE_CHECKING:
    # transformers 4 copies the files that this one names, and not those that they name.
    from .surgeon_fff import fast_feed_forward  # noqa: F401
    from .surgeon_fff_numba import dot  # noqa: F401
    from .surgeon_fff_triton import activated  # noqa: F401
    from .surgeon_mlgru import MLGRU  # noqa: F401
    from .surgeon_mlgru_triton import scan  # noqa: F401


needs("5.14", "a GPT-NeoX in this form")


@strict
class SurgeonGPTNeoXConfig(SurgeonConfigMixin, GPTNeoXConfig):
    model_type = "surgeon_gpt_neox"
    block_configs: list | None = None


class SurgeonGPTNeoXBlock(SurgeonBlock, GPTNeoXLayer):
    """GPTNeoXLayer with parts that may be absent."""

    attention_name = "attention"

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.parallel_residual = config.use_parallel_residual

    def attend(self, hidden_BTD, *args, **kwargs):
        contribution = super().attend(hidden_BTD, *args, **kwargs)
        return None if contribution is None else self.post_attention_dropout(contribution)

    def feed_forward(self, hidden_BTD):
        contribution = super().feed_forward(hidden_BTD)
        return None if contribution is None else self.post_mlp_dropout(contribution)


class SurgeonGPTNeoXForCausalLM(SurgeonModelMixin, GPTNeoXForCausalLM):
    config_class = SurgeonGPTNeoXConfig
    _no_split_modules = ["SurgeonGPTNeoXBlock", "ParallelBlock"]

    def __init__(self, config):
        super().__init__(config)
        swap_blocks(self.gpt_neox.layers, config, SurgeonGPTNeoXBlock)
        self.post_init()


SurgeonGPTNeoXConfig.register_for_auto_class()
SurgeonGPTNeoXForCausalLM.register_for_auto_class("AutoModelForCausalLM")
