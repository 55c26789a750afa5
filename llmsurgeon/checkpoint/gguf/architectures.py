"""What llama.cpp runs under which name: one row a family, read in both directions.

Names of tensors are the `gguf` package's own. A row holds the rest: keys, tensors that lie in another order, and what
llama.cpp's code takes for granted.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
# Stored [in, out] by GPT-2's classes.
PROJECTIONS = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")


class Key(NamedTuple):
    """One metadata value beyond the sizes: its key, without the architecture's prefix, and that of the config.

    `absent` is what llama.cpp takes where a file has no such key; None: there must be one.
    """

    name: str
    config: str
    kind: type = float
    absent: float | None = None


@dataclass(frozen=True)
class Architecture:
    """One `general.architecture` and what its code takes for granted.

    rope: neighbours ("pairs") or halves of a head turn together; transformers always turns halves.
    activations: what its FFN may compute, in transformers' words.
    windows: "periodic" where every nth block attends to everything and the others slide.
    by_head: the fused projection whose rows lie head by head; llama.cpp wants queries, then keys, then values.
    settings: config values that its code takes for granted, the first of which a file without the word means.
    told_by: settings that llama.cpp learns from the tensors: (config key, tensor of a block, value where it is there).
    experts: how a mixture's files call its FFN, and an expert's gate, up and down.
    """

    name: str
    rope: Literal["none", "halves", "pairs"] = "halves"
    activations: tuple[str, ...] = ("silu", "swish")
    windows: Literal["none", "periodic"] = "none"
    by_head: str = ""
    # Norm gains are stored as w and used as 1 + w.
    gains_from_one: bool = False
    # A tied model needs its head written all the same.
    own_head: bool = False
    # Heads may be wider or fewer than the model is wide.
    free_heads: bool = False
    # Only some dimensions of a head may turn.
    partial_rope: bool = False
    transposed: bool = False
    settings: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    told_by: tuple[tuple[str, str, bool], ...] = ()
    keys: tuple[Key, ...] = ()
    experts: tuple[str, str, str, str] | None = None
    # Every nth block has no rotary positions; 0: all have.
    bare_every: int = 0
    # Every nth block attends to everything, where the file does not say.
    full_every: int = 0
    # Queries are scaled by the width of a head; in the model with so many layers, by the model's width / heads.
    wide_layers: int = 0

    def query_width(self, layers: int, hidden: int, heads: int, head_dim: int) -> int:
        """The width whose root llama.cpp divides attention scores by."""
        return hidden // heads if layers == self.wide_layers else head_dim


GELU_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh")
# llama.cpp computes the tanh form for all of them; the two differ by 5e-4 at most.
GELU = ("gelu", *GELU_TANH)
# A cap that no score reaches: without the key, llama.cpp caps as Gemma 2 does.
NO_CAP = 1e30
BIASES = (("attention_bias", "attn_q.bias", True), ("mlp_bias", "ffn_up.bias", True))
EXPERTS = (Key("expert_count", "num_local_experts", int), Key("expert_used_count", "num_experts_per_tok", int))
LLAMA = Architecture("llama", rope="pairs", free_heads=True, told_by=BIASES)
GEMMA = Architecture(
    "gemma2", activations=GELU_TANH, windows="periodic", gains_from_one=True, free_heads=True, full_every=2
)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": LLAMA,
    "mistral": replace(LLAMA, told_by=()),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", free_heads=True, settings=(("attention_bias", (False,)),)),
    "gpt2": Architecture(
        "gpt2",
        rope="none",
        activations=GELU_TANH,
        transposed=True,
        settings=(("scale_attn_weights", (True,)), ("reorder_and_upcast_attn", (False,))),
    ),
    "gpt_neox": Architecture(
        "gptneox",
        activations=GELU,
        by_head="query_key_value",
        own_head=True,
        partial_rope=True,
        settings=(("attention_bias", (True,)),),
        keys=(Key("use_parallel_residual", "use_parallel_residual", bool),),
    ),
    "phi3": Architecture("phi3", partial_rope=True),
    "gemma2": replace(
        GEMMA,
        settings=(("attention_bias", (False,)),),
        keys=(
            Key("attn_logit_softcapping", "attn_logit_softcapping", absent=50.0),
            Key("final_logit_softcapping", "final_logit_softcapping", absent=30.0),
        ),
        wide_layers=46,
    ),
    "gemma3_text": replace(
        GEMMA,
        name="gemma3",
        settings=(
            ("attention_bias", (False,)),
            ("final_logit_softcapping", (None,)),
            ("attn_logit_softcapping", (None,)),
        ),
        full_every=6,
        wide_layers=62,
    ),
    "olmo2": Architecture("olmo2", own_head=True, settings=(("attention_bias", (False,)),)),
    "granite": Architecture(
        "granite",
        rope="pairs",
        free_heads=True,
        told_by=BIASES,
        keys=(
            Key("logit_scale", "logits_scaling"),
            Key("residual_scale", "residual_multiplier", absent=1.0),
            Key("embedding_scale", "embedding_multiplier", absent=1.0),
            Key("attention.scale", "attention_multiplier"),
        ),
    ),
    "smollm3": Architecture(
        "smollm3",
        rope="pairs",
        free_heads=True,
        bare_every=4,
        settings=(("attention_bias", (False,)), ("mlp_bias", (False,))),
    ),
    "stablelm": Architecture(
        "stablelm",
        own_head=True,
        partial_rope=True,
        told_by=(
            ("use_qkv_bias", "attn_q.bias", True),
            ("qk_layernorm", "attn_q_norm.weight", True),
            ("use_parallel_residual", "ffn_norm.weight", False),
        ),
    ),
    "falcon": Architecture(
        "falcon",
        activations=GELU,
        by_head="query_key_value",
        settings=(("parallel_attn", (True,)), ("bias", (False,)), ("alibi", (False,))),
    ),
    "bloom": Architecture(
        "bloom",
        rope="none",
        by_head="query_key_value",
        settings=(("apply_residual_connection_post_layernorm", (False,)),),
    ),
    "mixtral": Architecture(
        "llama",
        rope="pairs",
        free_heads=True,
        keys=EXPERTS,
        experts=("block_sparse_moe", "w1", "w3", "w2"),
    ),
    "qwen3_moe": Architecture(
        "qwen3moe",
        free_heads=True,
        # llama.cpp scales the chosen experts' weights to a sum of 1.
        settings=(("attention_bias", (False,)), ("norm_topk_prob", (True,))),
        keys=(
            *EXPERTS,
            Key("feed_forward_length", "intermediate_size", int),
            Key("expert_feed_forward_length", "moe_intermediate_size", int),
        ),
        experts=("mlp", "gate_proj", "up_proj", "down_proj"),
    ),
}
# Llama's block with a norm before each output projection; written, not read back.
BITNET = Architecture("bitnet", settings=(("attention_bias", (False,)), ("mlp_bias", (False,))))
# Those norms, and what the `gguf` package knows them as.
SUB_NORMS = (("self_attn.attn_sub_norm", "self_attn.inner_attn_ln"), ("mlp.ffn_sub_norm", "mlp.ffn_layernorm"))
# Blocks of differing shape: Llama's block with a width, a number of heads, or no attention, of its own.
UNEVEN = Architecture("deci", rope="pairs", free_heads=True)
UNEVEN_FAMILIES = ("llama", "mistral", "qwen2")


def tensor_map(architecture: str, blocks: int) -> Any:
    """The `gguf` package's map of tensor names."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    known = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
    return get_tensor_name_map(known[architecture], blocks)


def file_name(names: Any, name: str) -> tuple[str | None, int | None]:
    """(GGUF's name of a tensor, None where it has none; which part it is of one that stacks several, else None).

    `names` is a `tensor_map`. Stacked are experts, and the norms that StableLM 2 12B has for each head.
    """
    stem, _, kind = name.rpartition(".")
    part = None
    for ours, theirs in SUB_NORMS:
        stem = stem.replace(ours, theirs)
    if match := re.fullmatch(r"(.+\.experts|.+(?=\.norms))\.(?:norms\.)?(\d+)(.*)", stem):
        stem, part = match[1] + match[3], int(match[2])
    # Some names are known without the prefix of today's classes.
    found = names.get_name(stem) or names.get_name(stem.removeprefix("transformer."))
    return found and f"{found}.{kind}", part


class Order(NamedTuple):
    """How a tensor's numbers lie in a GGUF file: `there` from transformers' order, `back` to it."""

    there: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]


def order(architecture: Architecture, target: str, heads: int, kv_heads: int, head_dim: int) -> Order | None:
    """The order of the tensor that GGUF calls `target`, in a block with so many heads; None where it is the same."""
    stem, _, kind = target.rpartition(".")
    part = stem.rpartition(".")[2]
    if part in ("attn_q", "attn_k") and architecture.rope == "pairs":
        return _pairs(heads if part == "attn_q" else kv_heads)
    if part == "attn_qkv" and architecture.by_head:
        return _by_kind(heads, kv_heads, head_dim)
    if architecture.transposed and kind == "weight" and part in PROJECTIONS:
        return Order(_transpose, _transpose)
    return None


def _pairs(heads: int) -> Order:
    """Rows of queries or keys: what turns together lies side by side, not half a head apart."""

    def there(weight: Tensor) -> Tensor:
        half = weight.shape[0] // heads // 2
        return weight.view(heads, 2, half, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)

    def back(weight: Tensor) -> Tensor:
        half = weight.shape[0] // heads // 2
        return weight.view(heads, half, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)

    return Order(there, back)


def _by_kind(heads: int, kv_heads: int, head_dim: int) -> Order:
    """Rows of a fused projection: all queries, all keys, all values."""
    group = heads // kv_heads

    def there(weight: Tensor) -> Tensor:
        rows = weight.view(kv_heads, group + 2, head_dim, *weight.shape[1:])
        parts = (rows[:, :group], rows[:, group], rows[:, group + 1])
        return torch.cat([part.reshape(-1, *weight.shape[1:]) for part in parts])

    def back(weight: Tensor) -> Tensor:
        parts = weight.split([n * head_dim for n in (heads, kv_heads, kv_heads)])
        by_head = [part.reshape(kv_heads, -1, *weight.shape[1:]) for part in parts]
        return torch.cat(by_head, dim=1).reshape(weight.shape)

    return Order(there, back)


def _transpose(weight: Tensor) -> Tensor:
    return weight.T.contiguous()
