"""Vision-language models: where their text tower is. Operations work on the tower; the rest of the file goes along."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SURGEON_PREFIX = "surgeon_"


@dataclass(frozen=True)
class VisionLanguage:
    """A model whose config holds that of a text model under `text_config`.

    names: how files spell the text model's tensors, one alternative after the other: (prefix in the file, prefix in the
        text model by itself).
    uneven: families that the tower's modeling file knows; of others only uniform towers can be written.
    """

    model_type: str
    model_class: str
    names: tuple[tuple[tuple[str, str], ...], ...]
    uneven: tuple[str, ...] = ("llama",)
    examples: tuple[str, ...] = ()


TEXT_MODEL = (("model.text_model.", "model."), ("lm_head.", "lm_head."))

LLAVA = VisionLanguage(
    model_type="llava",
    model_class="LlavaForConditionalGeneration",
    names=(
        (("language_model.model.", "model."), ("language_model.lm_head.", "lm_head.")),
        (("model.language_model.", "model."), ("lm_head.", "lm_head.")),
    ),
    examples=("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf"),
)
IDEFICS3 = VisionLanguage(
    model_type="idefics3",
    model_class="Idefics3ForConditionalGeneration",
    names=(TEXT_MODEL,),
    examples=("HuggingFaceM4/Idefics3-8B-Llama3", "HuggingFaceTB/SmolVLM-Instruct"),
)
SMOLVLM = VisionLanguage(
    model_type="smolvlm",
    model_class="SmolVLMForConditionalGeneration",
    names=(TEXT_MODEL,),
    examples=("HuggingFaceTB/SmolVLM2-2.2B-Instruct", "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"),
)

VISION_LANGUAGE: dict[str, VisionLanguage] = {each.model_type: each for each in (LLAVA, IDEFICS3, SMOLVLM)}


def vision_language_of(config: Mapping[str, Any]) -> VisionLanguage | None:
    """The declaration that a config.json belongs to, converted checkpoints included; None for other models."""
    return VISION_LANGUAGE.get(str(config.get("model_type", "")).removeprefix(SURGEON_PREFIX))
