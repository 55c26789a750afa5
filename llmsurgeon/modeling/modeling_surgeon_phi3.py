"""Phi3 with blocks of differing shape; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.phi3.configuration_phi3 import Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer, Phi3ForCausalLM

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
class SurgeonPhi3Config(SurgeonConfigMixin, Phi3Config):
    model_type = "surgeon_phi3"
    block_configs: list | None = None


class SurgeonPhi3Block(SurgeonBlock, Phi3DecoderLayer):
    """Phi3DecoderLayer with parts that may be absent."""

    def attend(self, hidden_BTD, *args, **kwargs):
        contribution = super().attend(hidden_BTD, *args, **kwargs)
        return None if contribution is None else self.resid_attn_dropout(contribution)

    def feed_forward(self, hidden_BTD):
        contribution = super().feed_forward(hidden_BTD)
        return None if contribution is None else self.resid_mlp_dropout(contribution)


class SurgeonPhi3ForCausalLM(SurgeonModelMixin, Phi3ForCausalLM):
    config_class = SurgeonPhi3Config
    _no_split_modules = ["SurgeonPhi3Block", "ParallelBlock"]

    def __init__(self, config):
        super().__init__(config)
        swap_blocks(self.model.layers, config, SurgeonPhi3Block)
        self.post_init()


SurgeonPhi3Config.register_for_auto_class()
SurgeonPhi3ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
