"""StableLm with blocks of differing shape; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.stablelm import modeling_stablelm as stablelm
from transformers.models.stablelm.configuration_stablelm import StableLmConfig

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
class SurgeonStableLmConfig(SurgeonConfigMixin, StableLmConfig):
    model_type = "surgeon_stablelm"
    block_configs: list | None = None


class SurgeonStableLmBlock(SurgeonBlock, stablelm.StableLmDecoderLayer):
    """StableLmDecoderLayer with parts that may be absent."""

    returned_tuple = True
    ffn_in_names = ("mlp.gate_proj", "mlp.up_proj")

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.parallel_residual = self.shares_norm = config.use_parallel_residual

    def feed_forward(self, hidden_BTD):
        contribution = super().feed_forward(hidden_BTD)
        return None if contribution is None else self.dropout(contribution)


class Swapped(SurgeonModelMixin):
    """Mixed in before StableLm's own classes: their layers make room for the blocks of the config."""

    config_class = SurgeonStableLmConfig
    block_class = SurgeonStableLmBlock
    _no_split_modules = ["SurgeonStableLmBlock", "ParallelBlock"]


class SurgeonStableLmModel(Swapped, stablelm.StableLmModel):
    pass


class SurgeonStableLmForCausalLM(Swapped, stablelm.StableLmForCausalLM):
    pass


class SurgeonStableLmForSequenceClassification(Swapped, stablelm.StableLmForSequenceClassification):
    pass


class SurgeonStableLmForTokenClassification(Swapped, stablelm.StableLmForTokenClassification):
    pass


offer(
    AutoConfig=SurgeonStableLmConfig,
    AutoModel=SurgeonStableLmModel,
    AutoModelForCausalLM=SurgeonStableLmForCausalLM,
    AutoModelForSequenceClassification=SurgeonStableLmForSequenceClassification,
    AutoModelForTokenClassification=SurgeonStableLmForTokenClassification,
)
