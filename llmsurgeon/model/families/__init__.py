"""The supported families, by transformers model_type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmsurgeon.errors import SurgeryError
from llmsurgeon.model.families.base import Family
from llmsurgeon.model.families.bert import BERT
from llmsurgeon.model.families.bloom import BLOOM
from llmsurgeon.model.families.distilbert import DISTILBERT
from llmsurgeon.model.families.falcon import FALCON
from llmsurgeon.model.families.gemma2 import GEMMA2
from llmsurgeon.model.families.gemma3 import GEMMA3_TEXT
from llmsurgeon.model.families.gpt2 import GPT2
from llmsurgeon.model.families.gpt_neox import GPT_NEOX
from llmsurgeon.model.families.granite import GRANITE
from llmsurgeon.model.families.llama import LLAMA
from llmsurgeon.model.families.mistral import MISTRAL
from llmsurgeon.model.families.mixtral import MIXTRAL
from llmsurgeon.model.families.modernbert import MODERNBERT
from llmsurgeon.model.families.olmo2 import OLMO2
from llmsurgeon.model.families.opt import OPT
from llmsurgeon.model.families.phi3 import PHI3
from llmsurgeon.model.families.qwen2 import QWEN2
from llmsurgeon.model.families.qwen3 import QWEN3
from llmsurgeon.model.families.qwen3_moe import QWEN3_MOE
from llmsurgeon.model.families.roberta import ROBERTA
from llmsurgeon.model.families.smollm3 import SMOLLM3
from llmsurgeon.model.families.stablelm import STABLELM

DECODERS = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    GPT2,
    GPT_NEOX,
    PHI3,
    GEMMA2,
    GEMMA3_TEXT,
    OLMO2,
    GRANITE,
    SMOLLM3,
    STABLELM,
    FALCON,
    BLOOM,
    OPT,
    MIXTRAL,
    QWEN3_MOE,
)
ENCODERS = (BERT, ROBERTA, DISTILBERT, MODERNBERT)
FAMILIES: dict[str, Family] = {f.model_type: f for f in (*DECODERS, *ENCODERS)}

SURGEON_PREFIX = "surgeon_"


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that a config.json belongs to, converted checkpoints included.

    Raises:
        SurgeryError: the family is not supported; the message lists those that are.
    """
    model_type = str(config.get("model_type", "")).removeprefix(SURGEON_PREFIX)
    if model_type not in FAMILIES:
        raise SurgeryError(
            f"model_type {config.get('model_type')!r} is not supported; supported are {', '.join(FAMILIES)}. "
            "Adding a family is one file: see docs/adding-a-family.md"
        )
    return FAMILIES[model_type].with_head(config.get("architectures")).laid_out(config)


__all__ = ["FAMILIES", "SURGEON_PREFIX", "Family", "family_of"]
