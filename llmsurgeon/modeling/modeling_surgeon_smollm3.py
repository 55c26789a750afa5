"""SmolLM3 with blocks of differing shape; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.smollm3 import modeling_smollm3 as smollm3
from transformers.models.smollm3.configuration_smollm3 import SmolLM3Config

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
class SurgeonSmolLM3Config(SurgeonConfigMixin, SmolLM3Config):
    model_type = "surgeon_smollm3"
    block_configs: list | None = None


class SurgeonSmolLM3Block(SurgeonBlock, smollm3.SmolLM3DecoderLayer):
    """SmolLM3DecoderLayer with parts that may be absent."""


class Swapped(SurgeonModelMixin):
    """Mixed in before SmolLM3's own classes: their layers make room for the blocks of the config."""

    config_class = SurgeonSmolLM3Config
    block_class = SurgeonSmolLM3Block
    _no_split_modules = ["SurgeonSmolLM3Block", "ParallelBlock"]


class SurgeonSmolLM3Model(Swapped, smollm3.SmolLM3Model):
    pass


class SurgeonSmolLM3ForCausalLM(Swapped, smollm3.SmolLM3ForCausalLM):
    pass


class SurgeonSmolLM3ForSequenceClassification(Swapped, smollm3.SmolLM3ForSequenceClassification):
    pass


class SurgeonSmolLM3ForTokenClassification(Swapped, smollm3.SmolLM3ForTokenClassification):
    pass


offer(
    AutoConfig=SurgeonSmolLM3Config,
    AutoModel=SurgeonSmolLM3Model,
    AutoModelForCausalLM=SurgeonSmolLM3ForCausalLM,
    AutoModelForSequenceClassification=SurgeonSmolLM3ForSequenceClassification,
    AutoModelForTokenClassification=SurgeonSmolLM3ForTokenClassification,
)
