"""SmolVLM whose text tower has blocks of differing shape; ships inside converted checkpoints."""

from transformers.models.smolvlm.configuration_smolvlm import SmolVLMConfig
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMForConditionalGeneration

from .surgeon_llama_tower import TowerConfigMixin
from .surgeon_versions import strict


@strict
class SurgeonSmolVLMConfig(TowerConfigMixin, SmolVLMConfig):
    model_type = "surgeon_smolvlm"


class SurgeonSmolVLMForConditionalGeneration(SmolVLMForConditionalGeneration):
    config_class = SurgeonSmolVLMConfig


SurgeonSmolVLMConfig.register_for_auto_class()
SurgeonSmolVLMForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
