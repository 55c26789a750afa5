"""Bloom with blocks of differing shape; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.models.bloom import modeling_bloom as bloom
from transformers.models.bloom.configuration_bloom import BloomConfig

from .surgeon_blocks import SurgeonBlock, SurgeonConfigMixin, SurgeonModelMixin, offer
from .surgeon_versions import layer_call, strict

if TYPE_CHECKING:
    # transformers 4 copies the files that this one names, and not those that they name.
    from .surgeon_fff import fast_feed_forward  # noqa: F401
    from .surgeon_fff_numba import dot  # noqa: F401
    from .surgeon_fff_triton import activated  # noqa: F401
    from .surgeon_mlgru import MLGRU  # noqa: F401
    from .surgeon_mlgru_triton import scan  # noqa: F401


@strict
class SurgeonBloomConfig(SurgeonConfigMixin, BloomConfig):
    model_type = "surgeon_bloom"
    block_configs: list | None = None


class SurgeonBloomBlock(SurgeonBlock, bloom.BloomBlock):
    """BloomBlock with parts that may be absent, and FFNs of any width."""

    attention_name = "self_attention"
    returns_tuple = True

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        if width := getattr(config, "intermediate_size", None):
            self.mlp.dense_h_to_4h = nn.Linear(config.hidden_size, width)
            self.mlp.dense_4h_to_h = nn.Linear(width, config.hidden_size)

    # Bloom's attention and FFN add the residual themselves: with zeros in its place they give their contribution.

    def attend(self, hidden_BTD, *args, weights=None, **kwargs):
        call = layer_call(self, args, kwargs)
        if not hasattr(self, "self_attention"):
            return None
        read_BTD = self.attention_input(hidden_BTD)
        output, *more = self.self_attention(read_BTD, torch.zeros_like(hidden_BTD), **call)
        if weights is not None:
            weights += more
        return output

    def feed_forward(self, hidden_BTD):
        if not hasattr(self, "mlp"):
            return None
        return self.mlp(self.ffn_input(hidden_BTD), torch.zeros_like(hidden_BTD))


class Swapped(SurgeonModelMixin):
    """Mixed in before Bloom's own classes: their layers make room for the blocks of the config."""

    config_class = SurgeonBloomConfig
    block_class = SurgeonBloomBlock
    stack = "h"
    _no_split_modules = ["SurgeonBloomBlock", "ParallelBlock"]


class SurgeonBloomModel(Swapped, bloom.BloomModel):
    pass


class SurgeonBloomForCausalLM(Swapped, bloom.BloomForCausalLM):
    pass


class SurgeonBloomForSequenceClassification(Swapped, bloom.BloomForSequenceClassification):
    pass


class SurgeonBloomForTokenClassification(Swapped, bloom.BloomForTokenClassification):
    pass


offer(
    AutoConfig=SurgeonBloomConfig,
    AutoModel=SurgeonBloomModel,
    AutoModelForCausalLM=SurgeonBloomForCausalLM,
    AutoModelForSequenceClassification=SurgeonBloomForSequenceClassification,
    AutoModelForTokenClassification=SurgeonBloomForTokenClassification,
)
