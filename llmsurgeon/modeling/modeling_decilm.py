"""DeciLM (Nemotron-NAS): Llama whose blocks differ in shape. Ships inside converted checkpoints."""

import copy

from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM

from .configuration_decilm import DeciLMConfig
from .surgeon_versions import layer_arguments, layer_call


class DeciLMDecoderLayer(LlamaDecoderLayer):
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


class DeciLMForCausalLM(LlamaForCausalLM):
    config_class = DeciLMConfig
    _no_split_modules = ["DeciLMDecoderLayer"]

    def __init__(self, config):
        super().__init__(config)
        slot = 0
        for index, (kv_heads, width) in enumerate(config.sizes()):
            self.model.layers[index] = DeciLMDecoderLayer(config, kv_heads, width, slot)
            slot += kv_heads is not None
        self.post_init()

    def init_continuous_batching(self, *args, **kwargs):
        # It makes pages for keys and values of one shape, as many as the config has layers.
        raise ValueError(
            "DeciLM has blocks of differing shape, which transformers' continuous batching has no place for: call "
            "generate on a batch of prompts, padded on the left"
        )


DeciLMForCausalLM.register_for_auto_class("AutoModelForCausalLM")
