"""Qwen2 with blocks of differing shape; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config

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
class SurgeonQwen2Config(SurgeonConfigMixin, Qwen2Config):
    model_type = "surgeon_qwen2"
    block_configs: list | None = None


class SurgeonQwen2Block(SurgeonBlock, qwen2.Qwen2DecoderLayer):
    """Qwen2DecoderLayer with parts that may be absent."""


class Swapped(SurgeonModelMixin):
    """Mixed in before Qwen2's own classes: their layers make room for the blocks of the config."""

    config_class = SurgeonQwen2Config
    block_class = SurgeonQwen2Block
    _no_split_modules = ["SurgeonQwen2Block", "ParallelBlock"]


class SurgeonQwen2Model(Swapped, qwen2.Qwen2Model):
    pass


class SurgeonQwen2ForCausalLM(Swapped, qwen2.Qwen2ForCausalLM):
    pass


class SurgeonQwen2ForSequenceClassification(Swapped, qwen2.Qwen2ForSequenceClassification):
    pass


class SurgeonQwen2ForTokenClassification(Swapped, qwen2.Qwen2ForTokenClassification):
    pass


offer(
    AutoConfig=SurgeonQwen2Config,
    AutoModel=SurgeonQwen2Model,
    AutoModelForCausalLM=SurgeonQwen2ForCausalLM,
    AutoModelForSequenceClassification=SurgeonQwen2ForSequenceClassification,
    AutoModelForTokenClassification=SurgeonQwen2ForTokenClassification,
)
