"""DeciLM (Nemotron-NAS): Llama whose blocks differ in shape. Ships inside converted checkpoints."""

import copy

from transformers import AutoModel
from transformers.models.llama import modeling_llama as llama

from .configuration_decilm import DeciLMConfig
from .surgeon_versions import layer_arguments, layer_call


class DeciLMDecoderLayer(llama.LlamaDecoderLayer):
    """LlamaDecoderLayer with `kv_heads` key/value heads and an FFN of `width`; None is a part that is absent.

    `slot` is the place of its keys and values in the cache.
    """

    def __init__(self, config, kv_heads, width, slot):
        shape = copy.copy(config)
        shape.block_configs = None
        shape.num_key_value_heads = kv_heads or 1
        shape.intermediate_size = width or 1
        super().__init__(shape, slot)
        # Sizes are fixed now. What may change while a model lives has to reach blocks and masks alike.
        for module in self.modules():
            for name in [name for name, value in vars(module).items() if value is shape]:
                setattr(module, name, config)
        if kv_heads is None:
            del self.self_attn, self.input_layernorm
        if width is None:
            del self.mlp, self.post_attention_layernorm

    def forward(self, hidden_states, *args, **kwargs):
        call = layer_call(self, args, kwargs)
        if hasattr(self, "self_attn"):
            hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **call)[0]
        if hasattr(self, "mlp"):
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


DeciLMDecoderLayer.argument_names, DeciLMDecoderLayer.cache_name = layer_arguments(DeciLMDecoderLayer)


class Shaped:
    """Mixed in before Llama's own classes: their layers have the shapes of the config."""

    config_class = DeciLMConfig
    _no_split_modules = ["DeciLMDecoderLayer"]

    def __init__(self, config):
        # Heads make their body through AutoModel. The config's class may come from a copy of its file.
        AutoModel.register(type(config), DeciLMModel, exist_ok=True)
        super().__init__(config)
        body = self.base_model
        if body is not self and isinstance(body, Shaped):
            return
        slot = 0
        for index, (kv_heads, width) in enumerate(config.sizes()):
            body.layers[index] = DeciLMDecoderLayer(config, kv_heads, width, slot)
            slot += kv_heads is not None
        self.post_init()

    def init_continuous_batching(self, *args, **kwargs):
        # It makes pages for keys and values of one shape, as many as the config has layers.
        raise ValueError(
            "DeciLM has blocks of differing shape, which transformers' continuous batching has no place for: call "
            "generate on a batch of prompts, padded on the left"
        )


class DeciLMModel(Shaped, llama.LlamaModel):
    pass


class DeciLMForCausalLM(Shaped, llama.LlamaForCausalLM):
    pass


class DeciLMForSequenceClassification(Shaped, llama.LlamaForSequenceClassification):
    pass


class DeciLMForTokenClassification(Shaped, llama.LlamaForTokenClassification):
    pass


DeciLMModel.register_for_auto_class("AutoModel")
DeciLMForCausalLM.register_for_auto_class("AutoModelForCausalLM")
DeciLMForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
DeciLMForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
