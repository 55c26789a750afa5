"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: queries, keys and values in one matrix, gate and up in another."""

from dataclasses import replace

from llmsurgeon.model.families.llama import LLAMA

PHI3 = replace(
    LLAMA,
    # Its attention counts its query heads by the model's config, whatever a layer has.
    own_head_dim="",
    model_type="phi3",
    model_class="Phi3ForCausalLM",
    kv=(),
    queries="",
    fused_qkv=("qkv_proj", "by kind"),
    ffn_in=("gate_up_proj",),
    ffn_stacked=2,
    bare_longrope=True,
    examples=("microsoft/Phi-4-mini-instruct", "microsoft/phi-4"),
)
