"""A Llama body with blocks of differing shape, as the text tower of a vision-language model.

Ships inside converted checkpoints beside `modeling_surgeon_<model>.py`, whose config names it under `text_config`.
"""

from transformers import AutoConfig

from .modeling_surgeon_llama import SurgeonLlamaConfig
from .surgeon_versions import needs

needs("5.14", "a vision-language model in this form")


# The whole model's config makes its tower's through AutoConfig, and its class the tower through AutoModel.
AutoConfig.register("surgeon_llama", SurgeonLlamaConfig, exist_ok=True)


class TowerConfigMixin:
    """Reads `text_config` as the tower's own config class."""

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        text = config_dict.get("text_config")
        if isinstance(text, dict):
            config_dict = {**config_dict, "text_config": SurgeonLlamaConfig.from_dict(text)}
        return super().from_dict(config_dict, **kwargs)

    def get_text_config(self, decoder=None, encoder=None):
        return self.text_config.get_text_config(decoder=decoder, encoder=encoder)
