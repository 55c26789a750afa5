"""Idefics3 whose text tower has blocks of differing shape; ships inside converted checkpoints."""

from transformers.models.idefics3.configuration_idefics3 import Idefics3Config
from transformers.models.idefics3.modeling_idefics3 import Idefics3ForConditionalGeneration

from .surgeon_llama_tower import TowerConfigMixin
from .surgeon_versions import strict


@strict
class SurgeonIdefics3Config(TowerConfigMixin, Idefics3Config):
    model_type = "surgeon_idefics3"


class SurgeonIdefics3ForConditionalGeneration(Idefics3ForConditionalGeneration):
    config_class = SurgeonIdefics3Config


SurgeonIdefics3Config.register_for_auto_class()
SurgeonIdefics3ForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
