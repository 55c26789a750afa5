"""A Llama body with blocks of differing shape, as the text tower of a vision-language model.

Ships inside converted checkpoints beside `modeling_surgeon_<model>.py`, whose config names it under `text_config`.
"""

from transformers import AutoConfig, AutoModel
from transformers.models.llama.modeling_llama import LlamaModel

from .modeling_surgeon_llama import SurgeonLlamaBlock, SurgeonLlamaConfig
from .surgeon_blocks import SurgeonModelMixin, swap_blocks
from .surgeon_mlgru import pass_padding
from .surgeon_versions import needs

needs("5.14", "a vision-language model in this form")


class SurgeonLlamaModel(SurgeonModelMixin, LlamaModel):
    config_class = SurgeonLlamaConfig
    _no_split_modules = ["SurgeonLlamaBlock", "ParallelBlock"]

    def __init__(self, config):
        super().__init__(config)
        swap_blocks(self.layers, config, SurgeonLlamaBlock)
        pass_padding(self)
        self.post_init()


# The whole model's class builds its tower through AutoModel.
AutoConfig.register("surgeon_llama", SurgeonLlamaConfig, exist_ok=True)
AutoModel.register(SurgeonLlamaConfig, SurgeonLlamaModel, exist_ok=True)


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
