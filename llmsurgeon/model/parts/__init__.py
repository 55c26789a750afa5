"""The parts of a layer, one file a kind: its sizes, its entry in `block_configs`, its costs, what it does not bear.

A new kind of attention or FFN is one file and one line in a table below. Imports nothing beside itself.
"""

from llmsurgeon.model.parts.attention import ATTENTION_KEYS, AttentionSpec
from llmsurgeon.model.parts.base import SUB_NORM, Part, Touch
from llmsurgeon.model.parts.bitlinear import BitFFNSpec
from llmsurgeon.model.parts.dense import FFN_KEYS, FFNSpec
from llmsurgeon.model.parts.fff import FFFSpec
from llmsurgeon.model.parts.mlgru import MLGRUSpec
from llmsurgeon.model.parts.moe import MoESpec

# By the `kind` of an entry in block_configs; an entry without one is of the first.
ATTENTIONS: dict[str, type[AttentionSpec]] = {"softmax": AttentionSpec, "mlgru": MLGRUSpec}
FFNS: dict[str, type[FFNSpec]] = {"dense": FFNSpec, "moe": MoESpec, "fff": FFFSpec, "bitlinear": BitFFNSpec}

__all__ = [
    "ATTENTIONS",
    "ATTENTION_KEYS",
    "FFNS",
    "FFN_KEYS",
    "SUB_NORM",
    "AttentionSpec",
    "BitFFNSpec",
    "FFFSpec",
    "FFNSpec",
    "MLGRUSpec",
    "MoESpec",
    "Part",
    "Touch",
]
