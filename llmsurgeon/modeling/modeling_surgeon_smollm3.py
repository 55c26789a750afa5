"""SmolLM3 with blocks of differing shape; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.smollm3.configuration_smollm3 import SmolLM3Config
from transformers.models.smollm3.modeling_smollm3 import SmolLM3DecoderLayer, SmolLM3ForCausalLM

from .surgeon_blocks import SurgeonBlock, SurgeonConfigMixin, SurgeonModelMixin, swap_blocks
from .surgeon_mlgru import pass_padding
from .surgeon_versions import strict

if TYPE_CHECKING:
    # transformers 4 copies the files that this one names, and not those that they name.
    from .surgeon_fff import fast_feed_forward  # noqa: F401
    from .surgeon_fff_numba import dot  # noqa: F401
    from .surgeon_fff_triton import activated  # noqa: F401
    from .surgeon_mlgru_triton import scan  # noqa: F401


@strict
class SurgeonSmolLM3Config(SurgeonConfigMixin, SmolLM3Config):
    model_type = "surgeon_smollm3"
    block_configs: list | None = None


class SurgeonSmolLM3Block(SurgeonBlock, SmolLM3DecoderLayer):
    """SmolLM3DecoderLayer with parts that may be absent."""


class SurgeonSmolLM3ForCausalLM(SurgeonModelMixin, SmolLM3ForCausalLM):
    config_class = SurgeonSmolLM3Config
    _no_split_modules = ["SurgeonSmolLM3Block", "ParallelBlock"]

    def __init__(self, config):
        super().__init__(config)
        swap_blocks(self.model.layers, config, SurgeonSmolLM3Block)
        pass_padding(self.model)
        self.post_init()


SurgeonSmolLM3Config.register_for_auto_class()
SurgeonSmolLM3ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
