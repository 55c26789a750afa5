"""Blocks of differing shape inside a stock transformers model.

This file ships inside converted checkpoints next to `modeling_surgeon_<family>.py` and needs nothing
but torch and transformers. `config.block_configs` holds one entry per layer:

    attention: {no_op, num_attention_heads, num_key_value_heads, ...}
    ffn:       {no_op, intermediate_size, ...}
    parallel:  [entries]     # blocks that read the same input; their contributions add up

Shapes: B batch, T tokens, D model width.
"""

import copy

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


class SurgeonConfigMixin:
    """Gives a family's config `block_configs`, and a KV cache with one entry per attention that exists."""

    def get_text_config(self, decoder=None, encoder=None):
        # Caches are built from this view. Attentions that are gone must not hold a slot: an empty
        # first slot would report a sequence length of zero for ever.
        slots = list(attention_layers(self.block_configs or []))
        if not decoder or not self.block_configs or len(slots) == len(self.block_configs) == len(set(slots)):
            return self
        view = copy.copy(self)
        view.block_configs = None
        view.num_hidden_layers = len(slots)
        if getattr(self, "layer_types", None) is not None:
            view.layer_types = [self.layer_types[i] for i in slots]
        return view


def attention_layers(block_configs):
    """Layer index of every attention, in the order in which they take cache slots."""
    for index, entry in enumerate(block_configs):
        branches = entry.get("parallel") or [entry]
        yield from (index for branch in branches if not branch["attention"]["no_op"])


class SurgeonBlock(GradientCheckpointingLayer):
    """A decoder layer whose attention or FFN may be absent.

    Mixed in before a family's own decoder layer, which builds the parts. Subclasses name them.
    """

    attention_name = "self_attn"
    attention_norm_name = "input_layernorm"
    ffn_name = "mlp"
    ffn_norm_name = "post_attention_layernorm"
    parallel_residual = False

    def attend(self, hidden_BTD, *args, **kwargs):
        """Attention's contribution [B, T, D], None where there is no attention."""
        attention = getattr(self, self.attention_name, None)
        if attention is None:
            return None
        return attention(getattr(self, self.attention_norm_name)(hidden_BTD), *args, **kwargs)[0]

    def feed_forward(self, hidden_BTD):
        """The FFN's contribution [B, T, D], None where there is no FFN."""
        ffn = getattr(self, self.ffn_name, None)
        return None if ffn is None else ffn(getattr(self, self.ffn_norm_name)(hidden_BTD))

    def forward(self, hidden_states, *args, **kwargs):
        contribution = self.attend(hidden_states, *args, **kwargs)
        attended = hidden_states if contribution is None else hidden_states + contribution
        contribution = self.feed_forward(hidden_states if self.parallel_residual else attended)
        return attended if contribution is None else attended + contribution


class ParallelBlock(GradientCheckpointingLayer):
    """Blocks that read one input: x + sum over branches of (branch(x) - x). FFN Fusion, arXiv 2503.18908, section 5."""

    def __init__(self, branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, hidden_states, *args, **kwargs):
        output = hidden_states
        for branch in self.branches:
            output = output + (branch(hidden_states, *args, **kwargs) - hidden_states)
        return output


def swap_blocks(layers, config, block_class, width_key="intermediate_size"):
    """Replace each entry of `layers` (an nn.ModuleList) by the block that `config.block_configs` describes."""
    slot = 0

    def build(entry, index):
        nonlocal slot
        attention, ffn = entry["attention"], entry["ffn"]
        shape = copy.copy(config)
        shape.block_configs = None
        if not attention["no_op"]:
            shape.num_attention_heads = attention["num_attention_heads"]
            if hasattr(shape, "num_key_value_heads"):
                shape.num_key_value_heads = attention["num_key_value_heads"]
        if not ffn["no_op"]:
            setattr(shape, width_key, ffn["intermediate_size"])
        block = block_class(shape, index)
        if attention["no_op"]:
            delattr(block, block.attention_name)
            delattr(block, block.attention_norm_name)
        else:
            getattr(block, block.attention_name).layer_idx = slot
            slot += 1
        if ffn["no_op"]:
            delattr(block, block.ffn_name)
            delattr(block, block.ffn_norm_name)
        return block

    for index, entry in enumerate(config.block_configs):
        branches = entry.get("parallel")
        layers[index] = ParallelBlock([build(b, index) for b in branches]) if branches else build(entry, index)
