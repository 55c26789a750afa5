"""Olmo2 with blocks of differing shape; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.olmo2 import modeling_olmo2 as olmo2
from transformers.models.olmo2.configuration_olmo2 import Olmo2Config

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
class SurgeonOlmo2Config(SurgeonConfigMixin, Olmo2Config):
    model_type = "surgeon_olmo2"
    block_configs: list | None = None


class SurgeonOlmo2Block(SurgeonBlock, olmo2.Olmo2DecoderLayer):
    """Olmo2DecoderLayer with parts that may be absent."""

    attention_norm_name = None
    ffn_norm_name = None
    attention_post_norm_name = "post_attention_layernorm"
    ffn_post_norm_name = "post_feedforward_layernorm"
    attention_parts = ("self_attn", "post_attention_layernorm")
    ffn_parts = ("mlp", "post_feedforward_layernorm")


class Swapped(SurgeonModelMixin):
    """Mixed in before Olmo2's own classes: their layers make room for the blocks of the config."""

    config_class = SurgeonOlmo2Config
    block_class = SurgeonOlmo2Block
    _no_split_modules = ["SurgeonOlmo2Block", "ParallelBlock"]


class SurgeonOlmo2Model(Swapped, olmo2.Olmo2Model):
    pass


class SurgeonOlmo2ForCausalLM(Swapped, olmo2.Olmo2ForCausalLM):
    pass


offer(
    AutoConfig=SurgeonOlmo2Config,
    AutoModel=SurgeonOlmo2Model,
    AutoModelForCausalLM=SurgeonOlmo2ForCausalLM,
)

if hasattr(olmo2, "Olmo2ForSequenceClassification"):  # transformers 4.57 has none

    class SurgeonOlmo2ForSequenceClassification(Swapped, olmo2.Olmo2ForSequenceClassification):
        pass

    offer(AutoModelForSequenceClassification=SurgeonOlmo2ForSequenceClassification)
