"""SmolLM3: Llama's tensors, no rotary positions in every fourth layer."""

from dataclasses import replace

from llmsurgeon.model.families.llama import LLAMA

SMOLLM3 = replace(
    LLAMA,
    own_head_dim="read",
    model_type="smollm3",
    model_class="SmolLM3ForCausalLM",
    per_layer_lists=("layer_types", "no_rope_layers"),
    layer_rules=("no_rope_layer_interval",),
    rope_list="no_rope_layers",
    examples=("HuggingFaceTB/SmolLM3-3B",),
)
