"""OPT with blocks of differing shape; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from torch.nn import functional as F
from transformers.models.opt import modeling_opt as opt
from transformers.models.opt.configuration_opt import OPTConfig

from .surgeon_blocks import PostNormBlock, SurgeonBlock, SurgeonConfigMixin, SurgeonModelMixin, offer
from .surgeon_versions import layer_call, strict

if TYPE_CHECKING:
    # transformers 4 copies the files that this one names, and not those that they name.
    from .surgeon_fff import fast_feed_forward  # noqa: F401
    from .surgeon_fff_numba import dot  # noqa: F401
    from .surgeon_fff_triton import activated  # noqa: F401
    from .surgeon_mlgru import MLGRU  # noqa: F401
    from .surgeon_mlgru_triton import scan  # noqa: F401


@strict
class SurgeonOPTConfig(SurgeonConfigMixin, OPTConfig):
    model_type = "surgeon_opt"
    block_configs: list | None = None


class Layer(opt.OPTDecoderLayer):
    """OPTDecoderLayer, what it computes by part."""

    def attention_output(self, read_BTD, *args, **kwargs):
        return F.dropout(self.self_attn(read_BTD, *args, **kwargs)[0], self.dropout, self.training)

    def ffn_output(self, read_BTD):
        return F.dropout(self.fc2(self.activation_fn(self.fc1(read_BTD))), self.dropout, self.training)


class SurgeonOPTBlock(SurgeonBlock, Layer):
    """OPTDecoderLayer with parts that may be absent."""

    width_key = "ffn_dim"
    returned_tuple = True
    attention_norm_name = "self_attn_layer_norm"
    ffn_norm_name = "final_layer_norm"
    ffn_parts = ("fc1", "fc2", "final_layer_norm")
    ffn_in_names = ("fc1",)

    def attend(self, hidden_BTD, *args, weights=None, **kwargs):
        call = layer_call(self, args, kwargs)
        if not hasattr(self, "self_attn"):
            return None
        return self.attention_output(self.attention_input(hidden_BTD), **call)

    def feed_forward(self, hidden_BTD):
        return self.ffn_output(self.ffn_input(hidden_BTD)) if hasattr(self, "fc1") else None


class SurgeonOPTPostNormBlock(PostNormBlock, Layer):
    """The same where the norms follow the residual sums; they stay when their part goes."""

    width_key = "ffn_dim"
    returned_tuple = True
    attention_parts = ("self_attn",)
    ffn_parts = ("fc1", "fc2")

    def attended(self, hidden_BTD, *args, **kwargs):
        call = layer_call(self, args, kwargs)
        added = self.attention_output(hidden_BTD, **call) if hasattr(self, "self_attn") else 0
        return self.self_attn_layer_norm(hidden_BTD + added)

    def fed_forward(self, hidden_BTD):
        return self.final_layer_norm(hidden_BTD + (self.ffn_output(hidden_BTD) if hasattr(self, "fc1") else 0))


class Swapped(SurgeonModelMixin):
    """Mixed in before OPT's own classes: their layers make room for the blocks of the config."""

    config_class = SurgeonOPTConfig
    block_class = SurgeonOPTBlock
    stack = "decoder.layers"
    _no_split_modules = ["SurgeonOPTBlock", "SurgeonOPTPostNormBlock", "ParallelBlock"]

    def swap(self, body):
        if not self.config.do_layer_norm_before:
            self.block_class = SurgeonOPTPostNormBlock
        super().swap(body)


class SurgeonOPTModel(Swapped, opt.OPTModel):
    pass


class SurgeonOPTForCausalLM(Swapped, opt.OPTForCausalLM):
    pass


class SurgeonOPTForSequenceClassification(Swapped, opt.OPTForSequenceClassification):
    pass


offer(
    AutoConfig=SurgeonOPTConfig,
    AutoModel=SurgeonOPTModel,
    AutoModelForCausalLM=SurgeonOPTForCausalLM,
    AutoModelForSequenceClassification=SurgeonOPTForSequenceClassification,
)
