"""The supported families, by transformers model_type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmsurgeon.errors import SurgeryError
from llmsurgeon.families.base import Family
from llmsurgeon.families.gpt2 import GPT2
from llmsurgeon.families.gpt_neox import GPT_NEOX
from llmsurgeon.families.llama import LLAMA
from llmsurgeon.families.mistral import MISTRAL
from llmsurgeon.families.qwen2 import QWEN2
from llmsurgeon.families.qwen3 import QWEN3

FAMILIES: dict[str, Family] = {f.model_type: f for f in (LLAMA, MISTRAL, QWEN2, QWEN3, GPT2, GPT_NEOX)}

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
    return FAMILIES[model_type]


__all__ = ["FAMILIES", "SURGEON_PREFIX", "Family", "family_of"]
