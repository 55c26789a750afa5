"""GPTNeoX with blocks of differing shape; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.gpt_neox import modeling_gpt_neox as gpt_neox
from transformers.models.gpt_neox.configuration_gpt_neox import GPTNeoXConfig

from .surgeon_blocks import SurgeonBlock, SurgeonConfigMixin, SurgeonModelMixin, offer
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


class SurgeonGPTNeoXBlock(SurgeonBlock, gpt_neox.GPTNeoXLayer):
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


class Swapped(SurgeonModelMixin):
    """Mixed in before GPTNeoX's own classes: their layers make room for the blocks of the config."""

    config_class = SurgeonGPTNeoXConfig
    block_class = SurgeonGPTNeoXBlock
    _no_split_modules = ["SurgeonGPTNeoXBlock", "ParallelBlock"]


class SurgeonGPTNeoXModel(Swapped, gpt_neox.GPTNeoXModel):
    pass


class SurgeonGPTNeoXForCausalLM(Swapped, gpt_neox.GPTNeoXForCausalLM):
    pass


class SurgeonGPTNeoXForSequenceClassification(Swapped, gpt_neox.GPTNeoXForSequenceClassification):
    pass


class SurgeonGPTNeoXForTokenClassification(Swapped, gpt_neox.GPTNeoXForTokenClassification):
    pass


offer(
    AutoConfig=SurgeonGPTNeoXConfig,
    AutoModel=SurgeonGPTNeoXModel,
    AutoModelForCausalLM=SurgeonGPTNeoXForCausalLM,
    AutoModelForSequenceClassification=SurgeonGPTNeoXForSequenceClassification,
    AutoModelForTokenClassification=SurgeonGPTNeoXForTokenClassification,
)
