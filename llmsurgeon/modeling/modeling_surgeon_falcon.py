"""Falcon with blocks of differing shape; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from torch.nn import functional as F
from transformers.models.falcon import modeling_falcon as falcon
from transformers.models.falcon.configuration_falcon import FalconConfig

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
class SurgeonFalconConfig(SurgeonConfigMixin, FalconConfig):
    model_type = "surgeon_falcon"
    block_configs: list | None = None


class SurgeonFalconBlock(SurgeonBlock, falcon.FalconDecoderLayer):
    """FalconDecoderLayer with parts that may be absent."""

    width_key = "ffn_hidden_size"
    kv_heads_key = "num_kv_heads"
    returned_tuple = True
    attention_name = "self_attention"
    ffn_in_names = ("mlp.dense_h_to_4h",)
    returns_tuple = True

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.parallel_residual = config.parallel_attn
        if hasattr(self, "ln_attn"):
            self.attention_norm_name, self.ffn_norm_name = "ln_attn", "ln_mlp"
        else:
            self.shares_norm = config.parallel_attn

    def attend(self, hidden_BTD, *args, **kwargs):
        contribution = super().attend(hidden_BTD, *args, **kwargs)
        p = self.config.hidden_dropout if self.parallel_residual else self.config.attention_dropout
        return None if contribution is None else F.dropout(contribution, p, self.training)

    def feed_forward(self, hidden_BTD):
        contribution = super().feed_forward(hidden_BTD)
        return None if contribution is None else F.dropout(contribution, self.config.hidden_dropout, self.training)


class Swapped(SurgeonModelMixin):
    """Mixed in before Falcon's own classes: their layers make room for the blocks of the config."""

    config_class = SurgeonFalconConfig
    block_class = SurgeonFalconBlock
    stack = "h"
    _no_split_modules = ["SurgeonFalconBlock", "ParallelBlock"]


class SurgeonFalconModel(Swapped, falcon.FalconModel):
    pass


class SurgeonFalconForCausalLM(Swapped, falcon.FalconForCausalLM):
    pass


class SurgeonFalconForSequenceClassification(Swapped, falcon.FalconForSequenceClassification):
    pass


class SurgeonFalconForTokenClassification(Swapped, falcon.FalconForTokenClassification):
    pass


offer(
    AutoConfig=SurgeonFalconConfig,
    AutoModel=SurgeonFalconModel,
    AutoModelForCausalLM=SurgeonFalconForCausalLM,
    AutoModelForSequenceClassification=SurgeonFalconForSequenceClassification,
    AutoModelForTokenClassification=SurgeonFalconForTokenClassification,
)
