"""A tiny model of every form and family, in the classes that ship in checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from conftest import ENCODER_NAMES, FAMILY_NAMES, MIXTURE_NAMES, masked_head, tiny_encoder, tiny_model
from modeling.test_decilm import config as decilm_config
from operations.helpers import FALCON_7B, FALCON_RW, operate, taken
from operations.test_sub_norm import scores_of

from llmsurgeon.modeling.modeling_decilm import DeciLMForCausalLM
from llmsurgeon.operations.block import Block
from llmsurgeon.operations.fff import FFF
from llmsurgeon.operations.matmulfree import MatMulFree
from llmsurgeon.operations.parallel_blocks import ParallelBlocks
from llmsurgeon.operations.prune_attention import PruneAttention
from llmsurgeon.operations.prune_ffn import PruneFFN
from llmsurgeon.operations.prune_kv_heads import PruneKVHeads
from llmsurgeon.operations.prune_width import PruneWidth
from llmsurgeon.operations.ternary import Ternary

# Blocks of every shape: without attention, without FFN, narrow, with fewer heads, two in parallel.
CUTS = (
    PruneAttention(layers=(0,)),
    PruneFFN(layers=(1,)),
    PruneWidth(width=40, layers=(2,), score="magnitude"),
    ParallelBlocks(windows=((4, 5),)),
)


def cut(family: str, **changes: Any) -> Any:
    """A decoder of the surgeon form whose blocks have every shape."""
    model = tiny_model(family, **changes)
    return operate(model, *taken(model, CUTS), format="surgeon")[0]


def few_heads(family: str, **changes: Any) -> Any:
    """One whose attentions have fewer key/value heads than the config says of the parent's."""
    model = tiny_model(family, **changes)
    return operate(model, PruneKVHeads(kv_heads=1), PruneAttention(layers=(3,)), format="surgeon")[0]


def encoder(family: str) -> Any:
    """An encoder with a masked-LM head."""
    model = tiny_encoder(family, masked_head(family))
    return operate(model, *taken(model, (PruneAttention(layers=(2,)), PruneFFN(layers=(3,)))), format="surgeon")[0]


def mixed(family: str, *steps: Any, **changes: Any) -> Any:
    """What these steps make of a decoder."""
    return operate(tiny_model(family, **changes), *steps)[0]


def measured(family: str, step: Any) -> Any:
    """What a step makes of a decoder that asks for scores."""
    model = tiny_model(family)
    return operate(model, step, scores=scores_of(model, step))[0]


def decilm() -> Any:
    """Of the nemotron-nas form."""
    torch.manual_seed(0)
    return DeciLMForCausalLM(decilm_config()).eval()


DECODERS: dict[str, Callable[[], Any]] = {
    **{name: (lambda name=name: cut(name)) for name in (*FAMILY_NAMES, *MIXTURE_NAMES)},
    "falcon-7b": lambda: cut("falcon", **FALCON_7B),
    "falcon-alibi": lambda: cut("falcon", **FALCON_RW),
    "opt-350m": lambda: cut("opt", do_layer_norm_before=False),
    "gpt_neox-sequential": lambda: cut("gpt_neox", use_parallel_residual=False),
    "llama-few-heads": lambda: few_heads("llama"),
    "phi3-few-heads": lambda: few_heads("phi3"),
    "llama-normed": lambda: measured("llama", Ternary(method="round", sub_norm=True, layers=(1, 4))),
    "llama-leaf-trees": lambda: measured("llama", FFF(depth=1, leaf_width=24, shared=16, layers=(2,), min_tokens=4)),
    "qwen2-node-trees": lambda: measured("qwen2", FFF(form="node", depth=2, layers=(0, 3), min_tokens=4)),
    "mlgru-hybrid": lambda: mixed("llama", MatMulFree(layers=(0, 3))),
    "mlgru-windows": lambda: mixed("mistral", MatMulFree(layers=(2, 5))),
    "mlgru-ternary": lambda: mixed("qwen3", MatMulFree(layers=(2,), linears="ternary")),
    "decilm": decilm,
    "block-llama": lambda: mixed("llama", Block(block_length=4)),
    "block-mistral": lambda: mixed("mistral", Block(block_length=2, decoder="summation"), sliding_window=None),
    "block-qwen2": lambda: mixed("qwen2", Block(block_length=2, embedder="concat"), use_sliding_window=False),
    "block-qwen3": lambda: mixed("qwen3", Block(block_length=4, decoder="cross_attention", prefix_length=1)),
}
ENCODERS: dict[str, Callable[[], Any]] = {name: (lambda name=name: encoder(name)) for name in ENCODER_NAMES}
FORMS = {**DECODERS, **ENCODERS}


@cache
def built(name: str) -> Any:
    """The model, to be left as it is found."""
    return FORMS[name]()
