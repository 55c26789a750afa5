"""GPT2 with blocks of differing shape; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.gpt2 import modeling_gpt2 as gpt2
from transformers.models.gpt2.configuration_gpt2 import GPT2Config

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
class SurgeonGPT2Config(SurgeonConfigMixin, GPT2Config):
    model_type = "surgeon_gpt2"
    block_configs: list | None = None


class SurgeonGPT2Block(SurgeonBlock, gpt2.GPT2Block):
    """GPT2Block with parts that may be absent."""

    width_key = "n_inner"
    returned_tuple = True
    attention_name = "attn"
    attention_norm_name = "ln_1"
    ffn_norm_name = "ln_2"


class Swapped(SurgeonModelMixin):
    """Mixed in before GPT2's own classes: their layers make room for the blocks of the config."""

    config_class = SurgeonGPT2Config
    block_class = SurgeonGPT2Block
    stack = "h"
    _no_split_modules = ["SurgeonGPT2Block", "ParallelBlock"]


class SurgeonGPT2Model(Swapped, gpt2.GPT2Model):
    pass


class SurgeonGPT2ForCausalLM(Swapped, gpt2.GPT2LMHeadModel):
    pass


class SurgeonGPT2ForSequenceClassification(Swapped, gpt2.GPT2ForSequenceClassification):
    pass


class SurgeonGPT2ForTokenClassification(Swapped, gpt2.GPT2ForTokenClassification):
    pass


offer(
    AutoConfig=SurgeonGPT2Config,
    AutoModel=SurgeonGPT2Model,
    AutoModelForCausalLM=SurgeonGPT2ForCausalLM,
    AutoModelForSequenceClassification=SurgeonGPT2ForSequenceClassification,
    AutoModelForTokenClassification=SurgeonGPT2ForTokenClassification,
)
