"""Qwen3 MoE: Qwen3's attention, a mixture of experts for an FFN in every layer."""

from dataclasses import replace

from llmsurgeon.model.families.mixtral import MIXTURE
from llmsurgeon.model.families.modules import Experts
from llmsurgeon.model.families.qwen3 import QWEN3

DENSE_LAYERS = "which layers have a dense FFN depends on their number, and numbers change when blocks go"

QWEN3_MOE = replace(
    QWEN3,
    model_type="qwen3_moe",
    model_class="Qwen3MoeForCausalLM",
    ffn_in=(),
    ffn_out="",
    width_key="moe_intermediate_size",
    experts=Experts(
        "gate_proj",
        "up_proj",
        "down_proj",
        count_key="num_local_experts",
        per_token_key="num_experts_per_tok",
        published_count_key="num_experts",
    ),
    required=(("decoder_sparse_step", 1, DENSE_LAYERS), ("mlp_only_layers", [], DENSE_LAYERS)),
    unsupported=MIXTURE,
    examples=("Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-235B-A22B"),
)
