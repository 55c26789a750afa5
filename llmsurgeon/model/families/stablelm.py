"""StableLM: Llama's tensors with LayerNorm, in sequence or (StableLM 2 12B) in parallel behind one norm."""

from dataclasses import replace

from llmsurgeon.model.families.llama import LLAMA

STABLELM = replace(
    LLAMA,
    own_head_dim="",
    model_type="stablelm",
    model_class="StableLmForCausalLM",
    norm="layer",
    parallel_residual_key="use_parallel_residual",
    layouts=(
        ({"use_parallel_residual": True}, {"shares_norm": True}),
        (
            {"qk_layernorm": True},
            {
                "unsupported": (
                    ("prune_kv_heads", "each of its key heads has a norm of its own, and these do not merge"),
                )
            },
        ),
    ),
    examples=("stabilityai/stablelm-2-1_6b-chat", "stabilityai/stablelm-2-12b"),
)
