"""OLMo 2: attention and FFN read the stream as it is; what they give is normed before it is added."""

from dataclasses import replace

from llmsurgeon.model.families.llama import LLAMA

OLMO2 = replace(
    LLAMA,
    # Norms of queries and keys reach over all heads.
    own_head_dim="",
    model_type="olmo2",
    model_class="Olmo2ForCausalLM",
    attention_norm="",
    ffn_norm="",
    attention_post_norm="post_attention_layernorm",
    ffn_post_norm="post_feedforward_layernorm",
    # One norm for the keys of all heads together.
    kv=("k_proj", "v_proj", "k_norm"),
    examples=("allenai/OLMo-2-0425-1B-Instruct", "allenai/OLMo-2-0325-32B"),
)
