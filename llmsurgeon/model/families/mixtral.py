"""Mixtral: Mistral's attention, a mixture of experts for an FFN."""

from dataclasses import replace

from llmsurgeon.model.families.llama import LLAMA
from llmsurgeon.model.families.modules import Experts

# Refusals of every family whose FFN is a mixture of experts.
MIXTURE = (
    ("fuse_ffn", "a token goes to the experts that its layer's router chooses: a run has as many routers as layers"),
    ("prune_width", "its channels lie in experts that see different tokens, and the analysis scores dense FFNs alone"),
    ("fff", "its FFN is a mixture of experts: a tree would stand in for a router and all that it chooses from"),
    (
        "distill",
        "its experts lie stacked in the class and apart in the file, and distillation saves what the class has",
    ),
)

MIXTRAL = replace(
    LLAMA,
    model_type="mixtral",
    model_class="MixtralForCausalLM",
    ffn="block_sparse_moe",
    ffn_in=(),
    ffn_out="",
    experts=Experts("w1", "w3", "w2", count_key="num_local_experts", per_token_key="num_experts_per_tok"),
    unsupported=MIXTURE,
    examples=("mistralai/Mixtral-8x7B-Instruct-v0.1", "mistralai/Mixtral-8x22B-Instruct-v0.1"),
)
