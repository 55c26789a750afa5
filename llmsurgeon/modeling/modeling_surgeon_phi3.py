"""Phi3 with blocks of differing shape; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.phi3 import modeling_phi3 as phi3
from transformers.models.phi3.configuration_phi3 import Phi3Config

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
class SurgeonPhi3Config(SurgeonConfigMixin, Phi3Config):
    model_type = "surgeon_phi3"
    block_configs: list | None = None


class SurgeonPhi3Block(SurgeonBlock, phi3.Phi3DecoderLayer):
    """Phi3DecoderLayer with parts that may be absent."""

    def attend(self, hidden_BTD, *args, **kwargs):
        contribution = super().attend(hidden_BTD, *args, **kwargs)
        return None if contribution is None else self.resid_attn_dropout(contribution)

    def feed_forward(self, hidden_BTD):
        contribution = super().feed_forward(hidden_BTD)
        return None if contribution is None else self.resid_mlp_dropout(contribution)


class Swapped(SurgeonModelMixin):
    """Mixed in before Phi3's own classes: their layers make room for the blocks of the config."""

    config_class = SurgeonPhi3Config
    block_class = SurgeonPhi3Block
    _no_split_modules = ["SurgeonPhi3Block", "ParallelBlock"]


class SurgeonPhi3Model(Swapped, phi3.Phi3Model):
    pass


class SurgeonPhi3ForCausalLM(Swapped, phi3.Phi3ForCausalLM):
    pass


class SurgeonPhi3ForSequenceClassification(Swapped, phi3.Phi3ForSequenceClassification):
    pass


class SurgeonPhi3ForTokenClassification(Swapped, phi3.Phi3ForTokenClassification):
    pass


offer(
    AutoConfig=SurgeonPhi3Config,
    AutoModel=SurgeonPhi3Model,
    AutoModelForCausalLM=SurgeonPhi3ForCausalLM,
    AutoModelForSequenceClassification=SurgeonPhi3ForSequenceClassification,
    AutoModelForTokenClassification=SurgeonPhi3ForTokenClassification,
)
