"""SmolVLM whose text tower has blocks of differing shape; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.smolvlm.configuration_smolvlm import SmolVLMConfig
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMForConditionalGeneration

from .surgeon_blocks import SurgeonModelMixin
from .surgeon_llama_tower import TowerConfigMixin
from .surgeon_versions import strict

if TYPE_CHECKING:
    # transformers 4 copies the files that this one names, and not those that they name.
    from .modeling_surgeon_llama import SurgeonLlamaConfig  # noqa: F401
    from .surgeon_blocks import SurgeonConfigMixin  # noqa: F401
    from .surgeon_fff import fast_feed_forward  # noqa: F401
    from .surgeon_fff_numba import dot  # noqa: F401
    from .surgeon_fff_triton import activated  # noqa: F401
    from .surgeon_mlgru import MLGRU  # noqa: F401
    from .surgeon_mlgru_triton import scan  # noqa: F401


@strict
class SurgeonSmolVLMConfig(TowerConfigMixin, SmolVLMConfig):
    model_type = "surgeon_smolvlm"


class SurgeonSmolVLMForConditionalGeneration(SurgeonModelMixin, SmolVLMForConditionalGeneration):
    config_class = SurgeonSmolVLMConfig


SurgeonSmolVLMConfig.register_for_auto_class()
SurgeonSmolVLMForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
