"""LLaVA whose text tower has blocks of differing shape; ships inside converted checkpoints."""

from transformers.models.llava.configuration_llava import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

from .surgeon_llama_tower import TowerConfigMixin
from .surgeon_versions import read_names_as, strict


@strict
class SurgeonLlavaConfig(TowerConfigMixin, LlavaConfig):
    model_type = "surgeon_llava"


class SurgeonLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    config_class = SurgeonLlavaConfig


# Published files spell the tower's names as stock files do.
read_names_as("surgeon_llava", "llava")
SurgeonLlavaConfig.register_for_auto_class()
SurgeonLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
