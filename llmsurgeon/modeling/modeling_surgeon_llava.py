"""LLaVA whose text tower has blocks of differing shape; ships inside converted checkpoints."""

from typing import TYPE_CHECKING

from transformers.models.llava.configuration_llava import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

from .surgeon_blocks import SurgeonModelMixin
from .surgeon_llama_tower import TowerConfigMixin
from .surgeon_versions import read_names_as, strict

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
class SurgeonLlavaConfig(TowerConfigMixin, LlavaConfig):
    model_type = "surgeon_llava"


class SurgeonLlavaForConditionalGeneration(SurgeonModelMixin, LlavaForConditionalGeneration):
    config_class = SurgeonLlavaConfig


# Published files spell the tower's names as stock files do.
read_names_as("surgeon_llava", "llava")
SurgeonLlavaConfig.register_for_auto_class()
SurgeonLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
