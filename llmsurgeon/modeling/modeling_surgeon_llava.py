"""LLaVA whose text tower has blocks of differing shape; ships inside converted checkpoints."""

from huggingface_hub.dataclasses import strict
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.llava.configuration_llava import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

from .surgeon_llama_tower import TowerConfigMixin


@strict
class SurgeonLlavaConfig(TowerConfigMixin, LlavaConfig):
    model_type = "surgeon_llava"


class SurgeonLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    config_class = SurgeonLlavaConfig


# Published files spell the tower's names as stock files do.
register_checkpoint_conversion_mapping("surgeon_llava", get_checkpoint_conversion_mapping("llava"), overwrite=True)
SurgeonLlavaConfig.register_for_auto_class()
SurgeonLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
