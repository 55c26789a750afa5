"""StableLm with blocks of differing shape; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.stablelm.configuration_stablelm import StableLmConfig
from transformers.models.stablelm.modeling_stablelm import StableLmDecoderLayer, StableLmForCausalLM

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
class SurgeonStableLmConfig(SurgeonConfigMixin, StableLmConfig):
    model_type = "surgeon_stablelm"
    block_configs: list | None = None


class SurgeonStableLmBlock(SurgeonBlock, StableLmDecoderLayer):
    """StableLmDecoderLayer with parts that may be absent."""

    returned_tuple = True
    ffn_in_names = ("mlp.gate_proj", "mlp.up_proj")

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.parallel_residual = self.shares_norm = config.use_parallel_residual

    def feed_forward(self, hidden_BTD):
        contribution = super().feed_forward(hidden_BTD)
        return None if contribution is None else self.dropout(contribution)


class SurgeonStableLmForCausalLM(SurgeonModelMixin, StableLmForCausalLM):
    config_class = SurgeonStableLmConfig
    _no_split_modules = ["SurgeonStableLmBlock", "ParallelBlock"]

    def __init__(self, config):
        super().__init__(config)
        swap_blocks(self.model.layers, config, SurgeonStableLmBlock)
        self.post_init()


SurgeonStableLmConfig.register_for_auto_class()
SurgeonStableLmForCausalLM.register_for_auto_class("AutoModelForCausalLM")
