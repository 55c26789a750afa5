"""OPT: LayerNorm before (350M: behind) attention and FFN, fc1 and fc2 on the layer itself, learnt positions."""

from llmsurgeon.model.families.base import Family
from llmsurgeon.model.families.bert import POST_NORM

LOOSE_FFN = (("fff", "its FFN has no module of its own that trees could stand in for"),)

OPT = Family(
    model_type="opt",
    model_class="OPTForCausalLM",
    layers="model.decoder.layers",
    embedding="model.decoder.embed_tokens",
    final_norm="model.decoder.final_layer_norm",
    final_projection="model.decoder.project_out",
    attention="self_attn",
    attention_norm="self_attn_layer_norm",
    attention_out="out_proj",
    ffn="",
    ffn_norm="final_layer_norm",
    ffn_in=("fc1",),
    ffn_out="fc2",
    norm="layer",
    kv_heads_key=None,
    width_key="ffn_dim",
    per_layer_lists=(),
    unsupported=LOOSE_FFN,
    layouts=(
        (
            {"do_layer_norm_before": False},
            {"post_norm": True, "final_norm": "", "unsupported": (*POST_NORM, *LOOSE_FFN)},
        ),
        ({"_remove_final_layer_norm": True}, {"final_norm": ""}),
    ),
    examples=("facebook/opt-125m", "facebook/opt-66b"),
)
