"""The operations that a recipe can name: what a step needs, refuses, plans, and what follows from it.

A step is a frozen config; `base.Step` lists all that the rest of the program asks of one. May import model, the edits
of checkpoint and the settings of texts: no step touches a tensor, and none knows how it is measured, healed or written.
"""

from llmsurgeon.operations.base import Plan, Step, Subject
from llmsurgeon.operations.block import Block
from llmsurgeon.operations.distill import Distill
from llmsurgeon.operations.fff import FFF
from llmsurgeon.operations.fuse_ffn import FuseFFN
from llmsurgeon.operations.matmulfree import MatMulFree
from llmsurgeon.operations.parallel_blocks import ParallelBlocks
from llmsurgeon.operations.prune_attention import PruneAttention
from llmsurgeon.operations.prune_blocks import PruneBlocks
from llmsurgeon.operations.prune_experts import PruneExperts
from llmsurgeon.operations.prune_ffn import PruneFFN
from llmsurgeon.operations.prune_heads import PruneHeads
from llmsurgeon.operations.prune_kv_heads import PruneKVHeads
from llmsurgeon.operations.prune_width import PruneWidth
from llmsurgeon.operations.refit import Refit
from llmsurgeon.operations.ternary import Ternary
from llmsurgeon.operations.trim_vocab import TrimVocab

# A search lays its steps in this order.
OPERATIONS: dict[str, type[Step]] = {
    "trim_vocab": TrimVocab,
    "prune_attention": PruneAttention,
    "prune_ffn": PruneFFN,
    "prune_blocks": PruneBlocks,
    "prune_kv_heads": PruneKVHeads,
    "prune_heads": PruneHeads,
    "prune_width": PruneWidth,
    "prune_experts": PruneExperts,
    "fuse_ffn": FuseFFN,
    "parallel_blocks": ParallelBlocks,
    "fff": FFF,
    "ternary": Ternary,
    "matmulfree": MatMulFree,
    "block": Block,
    "refit": Refit,
    "distill": Distill,
}

__all__ = ["OPERATIONS", "Plan", "Step", "Subject"]
