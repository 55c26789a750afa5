"""Qwen3 with blocks of differing shape; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

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
class SurgeonQwen3Config(SurgeonConfigMixin, Qwen3Config):
    model_type = "surgeon_qwen3"
    block_configs: list | None = None


class SurgeonQwen3Block(SurgeonBlock, qwen3.Qwen3DecoderLayer):
    """Qwen3DecoderLayer with parts that may be absent."""


class Swapped(SurgeonModelMixin):
    """Mixed in before Qwen3's own classes: their layers make room for the blocks of the config."""

    config_class = SurgeonQwen3Config
    block_class = SurgeonQwen3Block
    _no_split_modules = ["SurgeonQwen3Block", "ParallelBlock"]


class SurgeonQwen3Model(Swapped, qwen3.Qwen3Model):
    pass


class SurgeonQwen3ForCausalLM(Swapped, qwen3.Qwen3ForCausalLM):
    pass


class SurgeonQwen3ForSequenceClassification(Swapped, qwen3.Qwen3ForSequenceClassification):
    pass


class SurgeonQwen3ForTokenClassification(Swapped, qwen3.Qwen3ForTokenClassification):
    pass


offer(
    AutoConfig=SurgeonQwen3Config,
    AutoModel=SurgeonQwen3Model,
    AutoModelForCausalLM=SurgeonQwen3ForCausalLM,
    AutoModelForSequenceClassification=SurgeonQwen3ForSequenceClassification,
    AutoModelForTokenClassification=SurgeonQwen3ForTokenClassification,
)
